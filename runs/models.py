"""docs/models.md: every causal LM type of the installed transformers at tiny size, through tests/zoo.py.

.venv/bin/python runs/models.py docs/models.md              # all of them
.venv/bin/python runs/models.py docs/models.md llama gpt2   # these anew, the other rows as they stand there

A type that takes too long or ends the process is a row, too.
"""

import multiprocessing
import sys
from collections import Counter
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo

LIMIT = 400
HEAD = """# Models

Every model type that transformers {version} lists for causal language modelling, built at tiny size with random weights and
compared with transformers' own `generate`: plain decoding, a chain, CaPE, beam, and GliDe with CaPE, alone and in a ragged
batch, {new} greedy tokens in float32; sliding windows are {window} tokens wide, less than any output. Made by `runs/models.py`.

**{passes} pass**, {refused} are refused at load with the reason, {wrong} are wrong, {other} were not built by this recipe
(their sizes go by other names, or they need more than token ids). What is not built here is probed when you load it, like any
target: a small tree is compared with its branches, and a model that fails is refused.

[Quantized, split and offloaded models](scaling.md#quantized-models) have a page of their own.

| model type | verdict | reason |
|---|---|---|
"""


def work(kind, results):
    import torch

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    results.put(zoo.check(kind))


def judged(kind):
    """In a process of its own: a hang or a crash of one type is its own row."""
    results = context.Queue()
    process = context.Process(target=work, args=(kind, results))
    process.start()
    try:
        return results.get(timeout=LIMIT)
    except Exception:
        return zoo.Verdict(kind, "not built", f"took more than {LIMIT} s, or ended the process")
    finally:
        process.kill()
        process.join()


context = multiprocessing.get_context("fork")  # the libraries are loaded already


def known_rows(page):
    """The verdicts that a page holds."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return {kind: zoo.Verdict(kind, verdict, reason) for kind, verdict, reason in cells if kind in zoo.every_kind()}


def page_of(rows):
    count = Counter(row.verdict for row in rows)
    head = HEAD.format(
        version=transformers.__version__,
        new=zoo.NEW,
        window=zoo.WINDOW,
        passes=count["passes"],
        refused=count["refused"],
        wrong=count["WRONG"] or "none",
        other=count["not built"],
    )
    return head + "".join(f"| {r.kind} | {r.verdict} | {r.reason.replace('|', '/')} |\n" for r in rows)


if __name__ == "__main__":
    path, wanted = Path(sys.argv[1]), sys.argv[2:] or zoo.every_kind()
    rows = known_rows(path.read_text()) if path.is_file() else {}
    for kind in wanted:
        rows[kind] = judged(kind)
        print(rows[kind], flush=True)
        path.write_text(page_of([rows[one] for one in sorted(rows)]))
