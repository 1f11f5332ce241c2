"""Text of any size as token ids in files, made once by all processes of a machine together, then mapped into memory.

    tokens.bin      uint32 token ids, one document after the other
    learned.bin     a byte a token: is it to be learned? Only where not all are
    documents.bin   int64: where each document begins
    tokens.json     what they were made of, written last: files without it, or of something else, are made again

Each process tokenizes its share of the rows into files of its own: whole files of the data where there are enough of them, else
blocks of rows in turn. The first process of the machine then joins them in the order of the rows. So the files are the same for
any number of processes, a window is read where it lies, and a resumed run finds them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, DataError
from ..files import write_atomic
from ..sources import on_hub, parts_of, reading
from .ranks import machine_number, of_machine, together
from .rows import check_completion, pieces_of
from .stream import PIECE, Stream, first_held_out

TOKENS, LEARNED, DOCUMENTS, CARD = "tokens.bin", "learned.bin", "documents.bin", "tokens.json"
TYPES: dict[str, Any] = {TOKENS: np.uint32, LEARNED: np.bool_, DOCUMENTS: np.int64}
BLOCK = 1024  # rows that one process tokenizes in a piece
UNITS = "units.npy"  # of a process: part, block, tokens and documents of each piece


def tokenized(path: Path, keep: Path, tokenizer: Any, vocab_size: int | None, loss_on: str) -> Stream:
    """All documents of `path` as one stream, whose files lie in the folder `keep`; each begins with the end-of-text token, if
    there is one. Arguments as for `data.load_streams`.

    Raises:
        DataError, InputError: see there.
        CheckpointError: the files cannot be written.
    """
    made_of = _made_of(path, tokenizer, vocab_size, loss_on)
    start, marked = tokenizer.eos_token_id, loss_on == "completion"
    here, ready = of_machine(), _card(keep).get("made_of") == made_of
    try:
        together(() if ready else _tokenize(path, _own(keep, here.number), tokenizer, vocab_size, marked))
        together(() if ready or not here.first else _join(path, keep, here.count, marked, start is not None, made_of))
    except OSError as error:
        raise CheckpointError(
            f"could not write the tokens of {path} to {keep} ({error.strerror or error}): name another --output"
        ) from None
    finally:
        shutil.rmtree(_own(keep, here.number), ignore_errors=True)
    mapped = {name: np.memmap(keep / name, dtype=TYPES[name], mode="r") for name in _names(marked)}
    documents = None if start is None else mapped[DOCUMENTS]  # nothing tells where one ends, either
    return Stream(mapped[TOKENS], mapped.get(LEARNED), documents, known=_card(keep)["digest"])


def _names(marked: bool) -> list[str]:
    return [TOKENS, DOCUMENTS, *([LEARNED] if marked else [])]


def _own(keep: Path, number: int) -> Path:
    """Where process `number` of this machine writes."""
    return keep / f".tokens.{machine_number()}.{number}"


def _card(keep: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((keep / CARD).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _made_of(path: Path, tokenizer: Any, vocab_size: int | None, loss_on: str) -> dict[str, Any]:
    """What decides the tokens. Of the Hub the name alone: a run keeps the rows that it began with."""
    files = [] if on_hub(path) else sorted(one for one in (path, *path.rglob("*")) if one.is_file())
    facts = [[str(one.relative_to(path)), one.stat().st_size, one.stat().st_mtime_ns] for one in files]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    words = [vocabulary, getattr(tokenizer, "chat_template", None), tokenizer.eos_token_id, vocab_size]
    return {"data": str(path), "files": _digest(facts), "tokenizer": _digest(words), "loss_on": loss_on}


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _tokenize(path: Path, own: Path, tokenizer: Any, vocab_size: int | None, marked: bool) -> Iterator[None]:
    """Write this process's share to the folder `own`, a row at a time."""
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    units: list[list[int]] = []
    with ExitStack() as stack:
        files = {name: stack.enter_context((own / name).open("wb")) for name in _names(marked)}
        read = stack.enter_context(reading(path))
        for unit, place, row in _share(path):
            if not units or units[-1][:2] != unit:
                units.append([*unit, 0, 0])
            ids, marks = document_of(row, place, tokenizer, vocab_size, marked)
            if ids:
                files[DOCUMENTS].write(np.int64(units[-1][2]).tobytes())
                files[TOKENS].write(np.array(ids, dtype=np.uint32).tobytes())
                if marked:
                    files[LEARNED].write(np.array(marks, dtype=np.bool_).tobytes())
                units[-1][2] += len(ids)
                units[-1][3] += 1
            read(row)
            yield
    np.save(own / UNITS, np.array(units, dtype=np.int64).reshape(-1, 4))


def _share(path: Path) -> Iterator[tuple[list[int], str, Any]]:
    """This process's rows, each with its place in words, and the piece of the whole that it belongs to."""
    here, parts = of_machine(), parts_of(path)
    by_part = len(parts) >= here.count
    for number, part in enumerate(parts):
        if by_part and number % here.count != here.number:
            continue
        for i, (place, row) in enumerate(part()):
            block = i // BLOCK
            if by_part or (number + block) % here.count == here.number:
                yield [number, block], place, row


def document_of(
    row: Any, place: str, tokenizer: Any, vocab_size: int | None, marked: bool
) -> tuple[list[int], list[bool]]:
    """The token ids of a row as a document, and which of them are to be learned (its first token belongs to what comes before
    it: False here).

    Raises:
        DataError: the row cannot be used; with its place.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    marks = [False] * len(ids)
    pieces = pieces_of(row, place, tokenizer)
    if marked:
        check_completion(pieces, row, place)
    for piece, counted in pieces:
        # Piece by piece, as in decoding, where a prompt is tokenized before its completion exists.
        more = tokenizer.encode(piece, add_special_tokens=False) if isinstance(piece, str) else piece
        ids += more
        marks += [counted] * len(more)
    if vocab_size is not None and ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise DataError(f"{place} holds token {wrong}, outside the target's vocabulary of {vocab_size}")
    return ids, marks


def _join(path: Path, keep: Path, count: int, marked: bool, starts: bool, made_of: dict[str, Any]) -> Iterator[None]:
    """Put the pieces of `count` processes into one stream in `keep`, and say there what it was made of.

    Args:
        starts: does each document begin with the end-of-text token? It is then to be learned where the token before it is.
    """
    own = [_own(keep, number) for number in range(count)]
    units = [(*unit, number) for number, one in enumerate(own) for unit in np.load(one / UNITS).tolist()]
    total = sum(unit[2] for unit in units)
    if total < 2:
        raise DataError(f"{path} holds no text")
    (keep / CARD).unlink(missing_ok=True)
    hashed, at, before, cut = hashlib.sha256(), 0, False, first_held_out(total)
    with ExitStack() as stack:
        sources = [{name: stack.enter_context((one / name).open("rb")) for name in _names(marked)} for one in own]
        whole = own[0] / "whole"
        whole.mkdir()
        out = {name: stack.enter_context((whole / name).open("wb")) for name in _names(marked)}
        for _, _, tokens, documents, number in sorted(units):
            source = sources[number]
            ids = np.fromfile(source[TOKENS], np.uint32, tokens)
            begins = np.fromfile(source[DOCUMENTS], np.int64, documents)
            hashed.update(ids[: max(0, cut - at)].tobytes())
            if marked and tokens:
                marks = np.fromfile(source[LEARNED], np.bool_, tokens)
                if starts:
                    marks[begins[1:]] = marks[begins[1:] - 1]
                    marks[0] = before
                before = marks[-1]
                marks.tofile(out[LEARNED])
            ids.tofile(out[TOKENS])
            (begins + at).tofile(out[DOCUMENTS])
            at += tokens
            yield
    for name in _names(marked):
        (whole / name).replace(keep / name)
    for first in range(0, cut, PIECE) if marked else ():
        hashed.update(np.fromfile(keep / LEARNED, np.bool_, min(PIECE, cut - first), offset=first).tobytes())
        yield
    card = {"made_of": made_of, "tokens": total, "digest": hashed.hexdigest()[:16]}
    write_atomic(keep / CARD, lambda file: file.write_text(json.dumps(card, indent=1) + "\n"))
    for one in keep.glob(f".tokens.{machine_number()}.*"):  # those of killed processes, too
        shutil.rmtree(one, ignore_errors=True)


def forget_empty(keep: Path) -> None:
    """Delete the folder, if nothing is in it."""
    with suppress(OSError):
        keep.rmdir()
