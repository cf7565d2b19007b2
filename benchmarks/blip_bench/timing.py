"""Implementations timed side by side: in turn, in one process, so that whatever else the machine does meets them alike.

Each round calls every implementation once. A ratio is taken within a round and its median over the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

Call = Callable[[], Any]


class Disagreement(RuntimeError):
    """Two implementations of one thing gave different results: their times say nothing."""


def require(agrees: bool, otherwise: str) -> None:
    """Raise Disagreement unless results agree."""
    if not agrees:
        raise Disagreement(otherwise)


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of the rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """How many times as fast `of` is as `beside`, implementations or groups, and how many times it should be (None: no
    target)."""

    of: str
    beside: str
    target: float | None = None


@dataclass(frozen=True)
class Case:
    """One piece of work and who does it.

    Attributes:
        name: what distinguishes the case within its task.
        calls: the implementations, by name. What a call returns goes to `check`.
        comparisons: the ratios of interest.
        groups: names that stand for several implementations, and so for the one that turns out to be the fastest.
        amount, unit: how much one call does: 4 "images".
        flops: of a call, of the implementations whose FLOPs are known. Where both of a comparison have them, their
            ratio is one of FLOPs a second, else one of seconds.
        check: given the results by name, returns how far they agree, in figures with a name, and raises Disagreement
            where they do not: a speed-up counts only for equal results.
        warm_up: done once, before the first round; without one everyone is called once.
    """

    name: str
    calls: Mapping[str, Call]
    comparisons: tuple[Comparison, ...] = ()
    amount: float = 1
    unit: str = "calls"
    flops: Mapping[str, float] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], dict[str, float]] = lambda results: {}
    warm_up: Call | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def beside(cls, name: str, ours: Call, peers: Mapping[str, Call], **more: Any) -> Case:
        """Ours, under that name, compared with each of the peers."""
        return cls(name, {"ours": ours, **peers}, tuple(Comparison("ours", peer) for peer in peers), **more)

    def get_warm(self) -> None:
        for call in self.calls.values() if self.warm_up is None else [self.warm_up]:
            call()


class Rounds:
    """What a case's calls took and returned."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.seconds: dict[str, list[float]] = {name: [] for name in case.calls}
        self.results: dict[str, Any] = {}

    def take(self, *names: str) -> None:
        """Call these once each and look at the clock."""
        for name in names:
            start = perf_counter()
            self.results[name] = self.case.calls[name]()
            self.seconds[name].append(perf_counter() - start)

    def fastest(self, name: str) -> str:
        """The member of a group with the least median; an implementation itself."""
        return min(self.case.groups.get(name, (name,)), key=lambda each: median(self.seconds[each]))

    def ratio(self, comparison: Comparison) -> Spread:
        flops, of, beside = self.case.flops, self.fastest(comparison.of), self.fastest(comparison.beside)
        work = flops[of] / flops[beside] if of in flops and beside in flops else 1.0
        return Spread.of(work * theirs / ours
                         for ours, theirs in zip(self.seconds[of], self.seconds[beside], strict=True))

    def summary(self) -> dict[str, Any]:
        """Everything that is known, for JSON. Raises Disagreement where the results do not agree."""
        return {
            "case": self.case.name, "amount": self.case.amount, "unit": self.case.unit,
            "implementations": {name: self._implementation(name) for name in self.seconds},
            "ratios": [self._comparison(each) for each in self.case.comparisons],
            "agreement": self.case.check(self.results),
        }

    def _implementation(self, name: str) -> dict[str, Any]:
        spread = Spread.of(self.seconds[name])
        found: dict[str, Any] = {"seconds": vars(spread), "per_second": self.case.amount / spread.median}
        if name in self.case.flops:
            found["tflops"] = self.case.flops[name] / spread.median / 1e12
        return found

    def _comparison(self, comparison: Comparison) -> dict[str, Any]:
        spread, target = self.ratio(comparison), comparison.target
        found: dict[str, Any] = {
            "of": comparison.of, "beside": comparison.beside,
            "fastest": [self.fastest(comparison.of), self.fastest(comparison.beside)], **vars(spread)}
        return found if target is None else found | {"target": target, "met": spread.median >= target}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Warm up, time every call in turn `rounds` times; what came out, as `Rounds.summary` has it."""
    case.get_warm()
    taken = Rounds(case)
    for _ in range(rounds):
        taken.take(*case.calls)
    return taken.summary()
