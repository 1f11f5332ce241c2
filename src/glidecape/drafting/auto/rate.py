"""What the time of a round is worth, and whether drafting is: running means that decide for the next round."""

from __future__ import annotations

from collections.abc import Sequence

SLOWER, SLOW, FAST, FORGET = 1 / 128, 1 / 32, 1 / 4, 1 / 2
LONGEST = 24  # rounds between two probes of a draft that does not pay, at most
RARELY = 256  # the same of a draft that has not paid for long
FADES, GONE = 0.9, 0.1  # with each probe that fails a draft's record becomes less, and below this it counts no more
OFTEN, SELDOM = 24, 96  # rounds between two probes of another proposal than a chain, at least and at most
PAUSES = 16, 256  # rounds between two tries of chains that do not pay for a batch, at least and at most
TRIED = 3  # rounds of such a try: the first of them finds nothing of the draft in the CPU's cache
GUESSED = 8  # rounds of a row that count as much as what is guessed of chains before the first
SURE = 8  # rounds of chains that pay, after which pauses are short again
SETTLED = 16  # rounds after which a choice is settled
RESTS = 3, 15  # rounds that then follow without a thought: at most so many, and where nothing pays for a batch
MOVED = 0.25  # share of its gain by which a chain's gain changes before it counts as another text


class Rate:
    """Tokens for the cost of a plain step of a row, now; one value a kind of law.

    The best policy of a process that renews itself each round spends time where it brings more tokens than the rate that the
    whole process runs at. The rate is its own outcome, so it is a running mean. Plain decoding has rate 1, and is always there.
    """

    def __init__(self, kinds: int) -> None:
        self.tokens, self.cost = [1.0] * kinds, [1.0] * kinds

    def of(self, kinds: Sequence[int]) -> float:
        """Mean over the rows of a batch."""
        return sum(max(1.0, self.tokens[kind] / self.cost[kind]) for kind in kinds) / len(kinds)

    def learn(self, kind: int, tokens: float, cost: float) -> None:
        """A row's tokens of a round and their expected cost, in plain steps."""
        self.tokens[kind] += SLOW * (tokens - self.tokens[kind])
        self.cost[kind] += SLOW * (cost - self.cost[kind])


class Depths:
    """How far chains went lately: running means, one value a kind of law.

    Attributes:
        wanted: depths after which another one was not worth its cost.
        reach: by depth, the probability that the chain's token there is accepted.
        usual: the same over a longer time.
    """

    def __init__(self, kinds: int, most: int) -> None:
        self.wanted, self.rounds = [2.0] * kinds, [0] * kinds
        self.reach = [[0.7 ** (1 + depth) for depth in range(most)] for _ in range(kinds)]
        self.usual = [mean.copy() for mean in self.reach]

    def want(self, kind: int, wanted: int) -> None:
        """A row's chain was worth drafting to this depth."""
        self.wanted[kind] += SLOW * (wanted - self.wanted[kind])

    def note(self, kind: int, accepted: int, missed: bool) -> None:
        """So many of a row's first choices were the target's own. `missed`: the next one was not, so nothing below it counts;
        else nobody knows.

        What came true is counted, not what was predicted: of the predictions those are looked at that promised most.

        >>> depths = Depths(1, 3)
        >>> before = depths.reach[0].copy()
        >>> depths.note(0, 1, False)
        >>> [now > then for now, then in zip(depths.reach[0], before)]
        [True, False, False]
        """
        mean, usual = self.reach[kind], self.usual[kind]
        self.rounds[kind] += 1
        fast, slow = max(SLOW, 1 / (GUESSED + self.rounds[kind])), max(SLOWER, 1 / (1 + self.rounds[kind]))
        for depth in range(len(mean) if missed else accepted):
            one = float(depth < accepted)
            mean[depth] += fast * (one - mean[depth])
            usual[depth] += slow * (one - usual[depth])

    def forget(self, kinds: Sequence[int]) -> None:
        """No chain was drafted: what the last ones brought is worth less by now."""
        for kind in set(kinds):
            mean = self.reach[kind]
            for depth, usual in enumerate(self.usual[kind]):
                mean[depth] += SLOW * (usual - mean[depth])

    def gain(self, kinds: Sequence[int], depths: float, usual: bool = False) -> float:
        """Tokens that chains of so many depths are expected to bring, all rows together. `usual`: over a longer time."""
        whole = int(depths)
        means = [(self.usual if usual else self.reach)[kind] for kind in kinds]
        return sum(sum(mean[:whole]) + (depths - whole) * sum(mean[whole : whole + 1]) for mean in means)


class Worth:
    """Is it worth to run the draft node by node? It is while what it gained lately is above what it cost; else it is asked
    rarely.

    A probe costs one or two plain rounds, because nothing of the draft is in the CPU's cache any more. Pauses double as long as
    probes fail, up to 24 rounds: a text that has become easy is noticed soon. After about 20 probes that all failed they go on
    to 256 rounds: those of a hopeless draft cost about a hundredth. They end with the first probe that succeeds.

    Attributes:
        record: 1 where the draft pays, and less with each probe that fails.
        gain: tokens a round and row over a plain round, before their cost; cost: in tokens at the rate of then. Both are
            running means that a few rounds change.
        promised, came: accepted nodes that were expected, and those that came: of many predictions the best are taken, which
            are those that promise too much, too.
    """

    def __init__(self, kinds: int) -> None:
        self.gain, self.cost = [1.0] * kinds, [0.0] * kinds
        self.promised, self.came = [1.0] * kinds, [1.0] * kinds
        self.pause = [1] * kinds
        self.waited = [0] * kinds
        self.record = [0.5] * kinds

    def of(self, kinds: Sequence[int], missing: Sequence[float]) -> float:
        """What drafting is expected to gain over its cost. `missing`: of each row, the part that copied tokens do not bring
        already."""
        return sum(self.gain[kind] * part - self.cost[kind] for kind, part in zip(kinds, missing, strict=True))

    def drafts(self, kinds: Sequence[int], missing: Sequence[float]) -> bool:
        """Draft in this round? See `of`."""
        if self.of(kinds, missing) >= 0:
            return True
        for kind in set(kinds):
            self.waited[kind] += 1
        return all(self.waited[kind] >= self.pause[kind] for kind in kinds)

    def learn(self, kind: int, gain: float, cost: float) -> None:
        """What a row's draft was expected to bring in a round in which it ran, and its cost, both in tokens."""
        paused = self.gain[kind] < self.cost[kind]
        part = FAST if not paused else 0.5
        self.gain[kind] += part * (gain - self.gain[kind])
        self.cost[kind] += part * (cost - self.cost[kind])
        self.waited[kind] = 0
        self.record[kind] *= FADES
        if self.gain[kind] >= self.cost[kind]:
            self.pays([kind])
            self.pause[kind] = 1
        elif paused:
            longest = RARELY if self.record[kind] < GONE else LONGEST
            self.pause[kind] = min(longest, 2 * self.pause[kind])

    def pays(self, kinds: Sequence[int]) -> None:
        """The draft is worth its cost now."""
        for kind in kinds:
            self.record[kind] = 1.0

    def correct(self, kind: int, promised: float, came: int) -> None:
        """A row's proposal was expected to have so many nodes accepted, and had."""
        self.promised[kind] += SLOW / 2 * (promised - self.promised[kind])
        self.came[kind] += SLOW / 2 * (came - self.came[kind])

    def truth(self, kind: int) -> float:
        """Of what is promised, the share that comes."""
        return self.came[kind] / max(1e-6, self.promised[kind])


class Tries:
    """When chains are tried again in a batch for which they do not pay: a few rounds in a row, of all rows.

    A try brings tokens, and says of each row how far its chain goes. Pauses become four times as long while tries fail.

    Attributes:
        left: rounds of a try that are still to be run.

    >>> tries = Tries()
    >>> for _ in range(tries.left):
    ...     tries.ran(False)
    >>> [round for round in range(400) if tries.wait() and not any(tries.ran(False) for _ in range(TRIED))]
    [15, 79, 335]
    """

    def __init__(self) -> None:
        self.left, self.waited, self.paid, self.pause = TRIED, 0, 0, PAUSES[0]

    def ran(self, pays: bool) -> None:
        """A chain was run. `pays`: not as a try."""
        if pays:
            self.left, self.waited, self.paid = 0, 0, self.paid + 1
            if self.paid >= SURE:
                self.pause = PAUSES[0]
        else:
            self.left, self.paid = self.left - 1, 0

    def wait(self) -> bool:
        """A round passes without a chain; is one to be tried in the next?"""
        self.waited += 1
        if self.waited >= self.pause:
            self.left, self.waited, self.pause = TRIED, 0, min(PAUSES[1], 4 * self.pause)
        return self.left > 0


class Lead:
    """How much more a proposal node by node gains, over its cost, than a chain would in the same place, in tokens: running
    means, one value a kind of law.

    Attributes:
        now: a few rounds change it, and it goes back to `usual` while chains are drafted.
        usual: over a longer time.
    """

    def __init__(self, kinds: int) -> None:
        self.now, self.usual, self.rounds = [0.0] * kinds, [0.0] * kinds, [0] * kinds

    def of(self, kinds: Sequence[int]) -> float:
        """All rows together."""
        return sum(self.now[kind] for kind in kinds)

    def learn(self, kind: int, lead: float) -> None:
        self.rounds[kind] += 1
        self.now[kind] += FAST * (lead - self.now[kind])
        self.usual[kind] += max(SLOW, 1 / self.rounds[kind]) * (lead - self.usual[kind])

    def forget(self, kinds: Sequence[int]) -> None:
        """A chain was drafted instead."""
        for kind in set(kinds):
            self.now[kind] += FORGET * (self.usual[kind] - self.now[kind])


class Probes:
    """When a chain that is best is left out for once, to see what a proposal node by node would gain now.

    A probe costs a part of a round. Pauses double while the chain stays best, and are short again once it brings more or less
    than at the newest probe: the text is another one then.

    >>> probes = Probes()
    >>> [round for round in range(300) if probes.due(1.0)]
    [23, 71, 167, 263]
    >>> [round for round in range(300, 400) if probes.due(2.0)]
    [300, 324, 372]
    """

    def __init__(self) -> None:
        self.chains, self.pause, self.gain = 0, OFTEN, 0.0

    def due(self, gain: float) -> bool:
        """A chain is best once more; leave it out? `gain`: tokens that it is expected to bring, a row."""
        self.chains += 1
        moved = abs(gain - self.gain) > MOVED * self.gain
        if self.chains < (OFTEN if moved else self.pause):
            return False
        self.pause = OFTEN if moved and self.gain else min(SELDOM, 2 * self.pause)
        self.chains, self.gain = 0, gain
        return True


class Settled:
    """A choice that stays the same. Thinking takes a few hundredths of a small model's round, so after some rounds the next few
    do as those before: the same chain, or nothing.

    Attributes:
        place: laws of the rows of the last choice, and whether they were several. One row more or less changes little.
        length, cost: of the chain that was chosen last, over a plain round; 0: nothing was.
        rests: rounds that may follow without a thought.

    >>> settled = Settled()
    >>> for _ in range(SETTLED + 1):
    ...     settled.note([0], (3, 0.4), False)
    >>> settled.rests, settled.note([0], (3, 0.4), True), settled.rests
    (3, None, 0)
    >>> for _ in range(SETTLED + 4):
    ...     settled.note([0, 0], (0, 0.0), False)
    >>> settled.rests
    15
    """

    def __init__(self) -> None:
        self.place: tuple[set[int], bool] | None = None
        self.length, self.cost = 0, 0.0
        self.rounds = self.rests = self.rested = 0

    def note(self, kinds: list[int], choice: tuple[int, float] | None, copies: bool) -> None:
        """What was chosen: a chain's length and cost, zeros for nothing, or None for a proposal node by node. `copies`: was
        there something likely to be copied, which a rest would miss?"""
        before, self.place = self.place, self.place_of(kinds)
        if choice is None:
            self.rounds = max(0, self.rounds - 4)  # a probe, perhaps
        elif copies or self.place != before or bool(choice[0]) != bool(self.length):
            self.rounds = 0
        else:
            self.rounds = min(self.rounds + 1, SETTLED)
        if choice is not None:
            self.length, self.cost = choice
        rests = choice is not None and self.rounds == SETTLED
        most = RESTS[len(kinds) > 1 and not self.length]
        # They double: what has been so for long will be so for some time.
        self.rested = self.rests = min(most, max(RESTS[0], 2 * self.rested)) if rests else 0

    @staticmethod
    def place_of(kinds: list[int]) -> tuple[set[int], bool]:
        """See `place`."""
        return set(kinds), len(kinds) > 1
