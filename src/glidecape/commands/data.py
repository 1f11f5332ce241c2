"""`glidecape data`: training corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..files import only_writer
from .parsing import add_to

if TYPE_CHECKING:
    from ..train.chat import ChatSource

app = typer.Typer(help="Make training corpora.", no_args_is_help=True)


@add_to(
    app,
    "glidecape data pysource --output corpus",
    "glidecape data pysource --output corpus --hold-out json,numpy --max-bytes 2e7",
)
def pysource(
    out: Annotated[Path, typer.Option("--output", "-o", help="Corpus folder to write.")],
    root: Annotated[
        list[Path] | None, typer.Option(help="Folder of Python packages; repeat. Default: site-packages.")
    ] = None,
    hold_out: Annotated[str, typer.Option(help="Packages kept out of training, joined by commas.")] = "",
    vocab_size: Annotated[int, typer.Option(min=512, max=65_535)] = 4096,
    max_bytes: Annotated[float | None, typer.Option(help="Most bytes of training text, such as 9e7.")] = None,
) -> None:
    """Tokenize the Python sources of installed packages: a corpus without any download."""
    from ..train.corpus import build_pysource

    held = tuple(name for name in hold_out.split(",") if name)
    with only_writer(out):
        counts = build_pysource(out, root, held, vocab_size, int(max_bytes) if max_bytes else None)
    print(json.dumps(counts))


@add_to(
    app,
    "glidecape data chat --source chats.jsonl --output corpus",
    "glidecape data chat --source a.jsonl:2e6 --source b.jsonl --output corpus --vocab-size 16384",
)
def chat(
    source: Annotated[
        list[str],
        typer.Option(help="A .jsonl(.gz) or .parquet of messages, prompt+completion or text; FILE:BYTES takes a part."),
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Corpus folder to write.")],
    vocab_size: Annotated[int, typer.Option(min=512, max=65_535)] = 8192,
    max_bytes: Annotated[
        float | None, typer.Option(help="Most bytes of each source that names no number itself, such as 2e6.")
    ] = None,
    max_row_tokens: Annotated[int, typer.Option(min=16, help="Rows with more tokens are left out.")] = 2048,
    valid_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the conversations, by their opening turn, that is held out.")
    ] = 0.01,
    licences: Annotated[
        Path | None,
        typer.Option(help="JSON file: an object with the licence of each source, by its file name without suffixes."),
    ] = None,
) -> None:
    """Tokenize chats of your own, with a tokenizer and a chat template of their own."""
    from ..train.chat import build_chat

    known = _licences(licences) if licences else {}
    sources = [_chat_source(text, int(max_bytes) if max_bytes else None) for text in source]
    with only_writer(out):
        counts = build_chat(out, sources, vocab_size, known, max_row_tokens, valid_share)
    print(json.dumps(counts))


def _chat_source(text: str, max_bytes: int | None) -> ChatSource:
    from ..sources import on_hub
    from ..train.chat import ChatSource

    path, colon, size = text.rpartition(":")
    if not colon or Path(text).exists() or on_hub(Path(text)):
        return ChatSource(Path(text), max_bytes)
    try:
        return ChatSource(Path(path), int(float(size)))
    except ValueError:
        raise InputError(f"--source takes FILE or FILE:BYTES, such as chats.jsonl:2e6, not '{text}'") from None


def _licences(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--licences {path} cannot be read as JSON ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"--licences {path} must be a JSON object that gives a licence for each source's name")
    return found
