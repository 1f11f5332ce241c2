"""Counts of a generation and the figures made of them; words as in docs/design.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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
        prefill_s: seconds to read the prompts, not part of total_s.
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
        """tau: emitted tokens a round, bonus included (>= 1)."""
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
