"""What a peer is to the benchmark.

A peer is any object with a name and `run`. A new one is a class in a file beside this and a line in `registry.py`; the runner
times it beside our methods and the report has a row for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...core.params import SamplingParams
from ...errors import InputError
from ...target.target import Target


class Peer(Protocol):
    """A library that decodes one prompt at a time.

    Attributes:
        name: of its row in the tables, such as "transformers".
        version: of the library, for provenance.
    """

    name: str
    version: str

    def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """Decode `prompt` (token ids).

        Args:
            params: temperature, `max_new_tokens` and `ignore_eos` are to be followed; at temperature above 0 the peer
                draws by its own means, so its tokens are not compared.

        Returns:
            The new tokens, and the seconds from the first of them to the last: prefill and first token are not in it, so
            they are the time of `len(tokens) - 1` tokens.
        """


@dataclass(frozen=True)
class PeerSource:
    """What peers are made of.

    Attributes:
        source: folder or Hub name of the target.
        target: the loaded target, for its dtype and device. Its module is ours; load the weights a second time.
        drafts: folders of the drafts by the names of `--draft`.
        draft_length: tokens drafted a round.
    """

    source: str
    target: Target
    drafts: Mapping[str, str] = field(default_factory=dict)
    draft_length: int = 5


def draft_lm(source: PeerSource) -> str:
    """The folder of the independent draft LM among the drafts; "vanilla", if several are.

    Raises:
        InputError: there is none.
    """
    from ...drafts.checkpoint import WEIGHTS

    found = {name: folder for name, folder in source.drafts.items() if not (Path(folder) / WEIGHTS).is_file()}
    if not found:
        raise InputError("this peer drafts with an independent LM: name one with --draft vanilla=FOLDER")
    return found.get("vanilla", next(iter(found.values())))
