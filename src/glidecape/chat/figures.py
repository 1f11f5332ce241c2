"""`Figures`: what is counted while answers are written, and how tokens are coloured by their origin."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# Of rich. "drafted": a server does not say whether by the chain or a sibling.
COLOURS = {"chain": "green", "sibling": "magenta", "copied": "cyan", "drafted": "green", "bonus": "default"}


@dataclass(frozen=True)
class Piece:
    """Some text of an answer; `origin`: where its token comes from, "" where nobody knows."""

    text: str
    origin: str = ""


@dataclass
class Figures:
    """Counts of one answer or several.

    Attributes:
        tokens: emitted.
        seconds: in which they came, without the reading of the prompt.
        rounds: of them; 0: unknown.
        origins: how many tokens are "chain", "sibling", "copied", "drafted" or "bonus".
    """

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    origins: Counter[str] = field(default_factory=Counter)

    def add(self, other: Figures) -> None:
        self.tokens += other.tokens
        self.seconds += other.seconds
        self.rounds += other.rounds
        self.origins += other.origins

    def __str__(self) -> str:
        """
        >>> print(Figures(10, 2.0, 4, Counter(chain=6, bonus=4)))
        10 tokens, 5.0 tokens/s, acceptance length 2.50, chain 60 %, bonus 40 %
        """
        said = [f"{self.tokens} tokens"]
        if self.seconds:
            said.append(f"{self.tokens / self.seconds:.1f} tokens/s")
        if self.rounds:
            said.append(f"acceptance length {self.tokens / self.rounds:.2f}")
        said += [f"{name} {100 * self.origins[name] / self.tokens:.0f} %" for name in COLOURS if self.origins[name]]
        return ", ".join(said)
