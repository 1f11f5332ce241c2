"""Counts of a generation and the figures made of them; words as in docs/words.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields


@dataclass
class RoundStats:
    """One row's round: nodes sent to verify (root excluded), accepted nodes, emitted tokens (bonus included), depths
    tested, and the deepest drafted depth."""

    drafted: int
    accepted: int
    emitted: int
    tested: int
    depth: int = 0


@dataclass
class Stats:
    """Counts over rounds.

    Attributes:
        rounds: proposals verified, one target forward each.
        drafted: nodes verified, roots excluded.
        accepted: nodes accepted.
        emitted: tokens emitted, bonus tokens included.
        tested: depths tested: accepted + 1 when a round ends in a rejection, else accepted.
        depths: deepest drafted depths, summed over rounds.
        draft_s, verify_s, total_s: seconds drafting, in the target's forward, and in whole rounds.
        prefill_s: seconds to take rows in and read their prompts, not part of total_s.

    >>> from glidecape import Stats
    >>> Stats(rounds=2, emitted=7).acceptance_length
    3.5
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    tested: int = 0
    depths: int = 0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, one: RoundStats) -> None:
        self.rounds += 1
        self.drafted += one.drafted
        self.accepted += one.accepted
        self.emitted += one.emitted
        self.tested += one.tested
        self.depths += one.depth
        self.lengths[one.emitted] += 1

    @property
    def acceptance_length(self) -> float:
        """Emitted tokens a round, bonus included (>= 1)."""
        return self.emitted / self.rounds if self.rounds else 0.0

    @property
    def alpha(self) -> float:
        """Accepted / tested."""
        return self.accepted / self.tested if self.tested else 0.0

    @property
    def draft_efficiency(self) -> float:
        """Accepted / drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Emitted tokens a second of rounds; prefill is reported apart."""
        return self.emitted / self.total_s if self.total_s else 0.0

    def as_dict(self) -> dict[str, float]:
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "emitted": self.emitted,
            "tested": self.tested,
            "acceptance_length": round(self.acceptance_length, 4),
            "alpha": round(self.alpha, 4),
            "draft_efficiency": round(self.draft_efficiency, 4),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "prefill_s": round(self.prefill_s, 5),
            "draft_s": round(self.draft_s, 5),
            "verify_s": round(self.verify_s, 5),
            "total_s": round(self.total_s, 5),
        }


def merged(each: Iterable[Stats]) -> Stats:
    """The sums of several counts.

    >>> merged([Stats(rounds=1, emitted=3), Stats(rounds=2, emitted=5)]).emitted
    8
    """
    total = Stats()
    for one in each:
        for count in fields(Stats):
            setattr(total, count.name, getattr(total, count.name) + getattr(one, count.name))
    return total


def loops(tokens: list[int], span: int = 8, times: int = 3) -> bool:
    """Does the second half repeat an earlier span of `span` tokens, one and the same, `times` times or more?

    >>> loops([1, 2, 3, 4] * 16), loops(list(range(64))), loops([*range(40), *range(20), *range(50, 70)])
    (True, False, False)
    """
    seen: set[tuple[int, ...]] = set()
    repeats: Counter[tuple[int, ...]] = Counter()
    for start in range(len(tokens) - span + 1):
        piece = tuple(tokens[start : start + span])
        if piece in seen and start >= len(tokens) // 2:
            repeats[piece] += 1
        seen.add(piece)
    return max(repeats.values(), default=0) >= times


def repetition(tokens: list[int], span: int = 4) -> float:
    """Share of the spans of `span` tokens that occurred before.

    >>> repetition([1, 2, 3, 4, 5]), repetition([7] * 8)
    (0.0, 0.8)
    """
    spans = [tuple(tokens[i : i + span]) for i in range(len(tokens) - span + 1)]
    return 1 - len(set(spans)) / len(spans) if spans else 0.0
