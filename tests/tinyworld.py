"""A whole world in seconds: a corpus of generated packages, a tiny target trained on it, and drafts."""

from pathlib import Path

import torch

from glidecape.target.target import Target
from glidecape.train.corpus import build_pysource
from glidecape.train.draft import train_draft
from glidecape.train.loop import Budget
from glidecape.train.recipe import DraftRecipe, TargetShape, Windowing
from glidecape.train.target import train_target

VERBS = ("load", "save", "check", "merge", "split", "count")
NOUNS = ("table", "record", "index", "page", "token", "frame", "queue")


def write_packages(root: Path) -> None:
    for p in range(6):
        folder = root / f"package{p}"
        folder.mkdir(parents=True)
        for f in range(4):
            lines = [f'"""Module {f} of package {p}."""', ""]
            for i in range(8):
                verb, noun = VERBS[(i + p) % len(VERBS)], NOUNS[(i * f + p) % len(NOUNS)]
                lines += [f"def {verb}_{noun}({noun}, size={i}):", f"    for item in {noun}:", "        size += item"]
                lines += ["    return size", "", ""]
            (folder / f"module{f}.py").write_text("\n".join(lines))


def make_world(folder: Path) -> dict[str, Path]:
    """Paths: corpus, target, glide, eagle, medusa, lm."""
    torch.manual_seed(0)
    write_packages(folder / "site")
    build_pysource(folder / "corpus", [folder / "site"], ("package1",), vocab_size=400)
    shape = TargetShape(layers=2, width=32, ffn=64, heads=2, kv_heads=2, context=192)
    windowing = Windowing(length=64, rows=8, long_length=128)
    train_target(folder / "corpus", folder / "target", shape, Budget(tokens=40 * 8 * 64), windowing, rate=1e-2)
    target = Target.from_pretrained(folder / "target", dtype=torch.float32)
    for kind in ("glide", "eagle", "medusa", "lm"):
        recipe = DraftRecipe(kind=kind, length=64, rows=8, rate=1e-2)
        train_draft(target, folder / "corpus", folder / kind, recipe, Budget(tokens=25 * 8 * 64), "test", prompts=2)
    return {name: folder / name for name in ("corpus", "target", "glide", "eagle", "medusa", "lm")}
