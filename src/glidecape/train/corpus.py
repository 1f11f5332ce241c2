"""A training corpus from the Python sources that are already installed on this machine: no download.

Layout of the folder written by `build_pysource`:

    tokenizer.json, tokenizer_config.json   byte-level BPE, loadable by `AutoTokenizer.from_pretrained`
    train.bin, valid.bin                    uint16 token ids; every document is preceded by the end-of-text token
    sources.json                            packages with version, licence, bytes, and which of them were held out
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..progress import bar

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
ROLES = ("system", "user", "assistant")
MARKS = (END_OF_TEXT, END_OF_TURN, *(f"<|{role}|>" for role in ROLES))  # the special tokens of a corpus of chats
MIN_BYTES, MAX_BYTES = 400, 200_000


@dataclass(frozen=True)
class Source:
    """One Python file: the package it belongs to (the first folder below the root) and its text."""

    package: str
    text: str


def read_sources(roots: list[Path]) -> Iterator[Source]:
    """Python files below `roots`, each text once, without generated tables (very long lines).

    Raises:
        DataError: a root does not exist.
    """
    seen: set[bytes] = set()
    for root in roots:
        if not root.is_dir():
            raise DataError(f"no folder at {root}: name one that holds Python packages with --root")
        for path in sorted(root.rglob("*.py")):
            try:
                raw = path.read_bytes()
                text = raw.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a broken link or another encoding: one file less
            if not MIN_BYTES <= len(raw) <= MAX_BYTES or len(text) / (text.count("\n") + 1) > 80:
                continue
            digest = hashlib.sha256(raw).digest()
            if digest not in seen:
                seen.add(digest)
                yield Source(path.relative_to(root).parts[0].removesuffix(".py"), text)


def rank(*parts: str) -> str:
    """A reproducible shuffle key."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _provenance(roots: list[Path]) -> dict[str, dict[str, str]]:
    """Version and licence of each package below `roots`, as the metadata beside it states them."""
    found: dict[str, dict[str, str]] = {}
    for one in metadata.distributions(path=[str(root) for root in roots]):
        info: Any = one.metadata  # an email.message.Message, whatever its stub says
        licence = info.get("License-Expression") or next(
            (c.split("::")[-1].strip() for c in info.get_all("Classifier") or [] if c.startswith("License ::")),
            (info.get("License") or "unknown").strip().splitlines()[0][:60],
        )
        for package in {Path(str(file)).parts[0].removesuffix(".py") for file in one.files or []}:
            described = {"distribution": info["Name"], "version": info["Version"], "licence": licence}
            found.setdefault(package, described)
    return found


def default_roots() -> list[Path]:
    """Where this interpreter keeps its installed packages."""
    return [Path(sysconfig.get_paths()["purelib"])]


def _held_out(size: dict[str, int], named: tuple[str, ...], share: float) -> set[str]:
    """The packages that are held out: those that are named, then small ones in a fixed order, up to `share` of the bytes."""
    total, held = sum(size.values()), set(named)
    for package in sorted(size, key=lambda p: rank("hold out", p)):
        if sum(size[p] for p in held) < share * total and size[package] < total * share:
            held.add(package)
    return held


def _trained_bpe(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of these texts, which puts an end-of-text token before a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with bar("learning a vocabulary"):
        bpe.train_from_iterator(texts, trainer=trainer)
    # A prompt begins as every training document does.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, bpe.token_to_id(END_OF_TEXT))]
    )
    return bpe


def encoded(bpe: Any, texts: Sequence[str], at_once: int = 500) -> list[np.ndarray]:
    """The token ids of each text, uint16."""
    rows: list[np.ndarray] = []
    with bar("tokenizing", len(texts)) as shown:
        for first in range(0, len(texts), at_once):
            found = bpe.encode_batch(list(texts[first : first + at_once]))
            rows += [np.array(one.ids, dtype=np.uint16) for one in found]
            shown.at(len(rows))
    return rows


def build_pysource(
    out: Path,
    roots: list[Path] | None = None,
    hold_out: tuple[str, ...] = (),
    vocab_size: int = 4096,
    max_bytes: int | None = None,
    valid_share: float = 0.02,
) -> dict[str, int]:
    """Tokenize installed Python sources into `out`; whole packages are held out for validation.

    Besides the packages named in `hold_out`, packages are held out in a fixed pseudo-random order until they make up
    `valid_share` of the bytes. `max_bytes` keeps that much text, chosen file by file in the same kind of order.

    Returns:
        Counts: files, packages, train_tokens, valid_tokens.
    Raises:
        DataError: no usable source was found.
    """
    from transformers import PreTrainedTokenizerFast

    with bar("reading sources"):
        sources = sorted(read_sources(roots or default_roots()), key=lambda s: rank(s.package, s.text))
    if not sources:
        raise DataError(f"no Python sources below {roots or default_roots()}: name folders with --root")
    size: dict[str, int] = Counter()
    for source in sources:
        size[source.package] += len(source.text)
    if unknown := set(hold_out) - size.keys():
        raise DataError(f"no package {', '.join(sorted(unknown))} to hold out: there are {', '.join(sorted(size))}")
    held = _held_out(size, hold_out, valid_share)
    train = [s for s in sources if s.package not in held]
    valid = [s for s in sources if s.package in held]
    if not train or not valid:
        raise DataError(f"{len(size)} package(s) are too few to hold one out whole: add folders with --root")
    if max_bytes is not None:
        ends = accumulate(len(source.text) for source in train)
        train = [source for source, end in zip(train, ends, strict=True) if end <= max_bytes] or train[:1]
    bpe = _trained_bpe([source.text for source in train[:4000]], vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT).save_pretrained(out)

    bpe.encode_special_tokens = True  # a source that spells the end-of-text token out means its letters
    counts = {"files": len(sources), "packages": len(size)}
    for name, part in (("train", train), ("valid", valid)):
        tokens = np.concatenate(encoded(bpe, [source.text for source in part]))
        tokens.tofile(out / f"{name}.bin")
        counts[f"{name}_tokens"] = len(tokens)
    known = _provenance(roots or default_roots())
    table = [
        {"package": p, "bytes": size[p], "held_out": p in held, **known.get(p, {})} for p in sorted(size, key=str.lower)
    ]
    (out / "sources.json").write_text(json.dumps({"counts": counts, "packages": table}, indent=1) + "\n")
    return counts
