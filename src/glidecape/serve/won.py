"""`PlainRounds`: what a round of plain decoding takes on this machine, so that the server can say what drafts win or lose.

All that the server knows of costs is here: seconds of a plain round by the number of its rows. It is measured at the start,
after short prompts; plain rounds take longer the longer the texts are, so for long texts less is shown than is won.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..costmodel import RoundCosts
from ..costs import verification_ratios
from ..target.target import Target

CONTEXT = 32  # tokens of the prompts that are timed
REPEATS = 5


@dataclass(frozen=True)
class PlainRounds:
    """Seconds of a plain round at these numbers of rows; between them it is linear.

    >>> PlainRounds((1, 5), (0.25, 0.75)).won(rows=1, emitted=4, seconds=0.5), PlainRounds((1,), (0.25,)).of(9)
    (0.5, 0.25)
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def measured(cls, target: Target, most: int) -> PlainRounds:
        """Timed for 1 to `most` rows."""
        rows = tuple(sorted({1, min(4, most), most}))
        prompt = [(7 * i + 1) % target.vocab_size for i in range(min(CONTEXT, target.context // 2))]
        found = [verification_ratios(target, [prompt] * count, sizes=(1,), repeats=REPEATS) for count in rows]
        # Fewer rows never take longer: where the clock says so, the machine was busy.
        return cls(rows, tuple(min(one.step_s for one in found[i:]) for i in range(len(rows))))

    def of(self, rows: int) -> float:
        """Seconds of a plain round of so many rows."""
        return RoundCosts(0.0, self.rows, self.seconds).verify(rows)

    def won(self, rows: int, emitted: int, seconds: float) -> float:
        """Seconds that a round won against plain rounds that emit as many tokens, all rows together; negative: lost."""
        return self.of(rows) * emitted / rows - seconds
