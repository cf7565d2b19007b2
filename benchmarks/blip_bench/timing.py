"""Times implementations in turn, in one process, so that other load on the machine affects all alike.

Each round calls every implementation once. A ratio is computed within a round, its median over all rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

Call = Callable[[], Any]


class Disagreement(RuntimeError):
    """Two implementations gave different results, so their times cannot be compared."""


def require(agrees: bool, otherwise: str) -> None:
    """Raise Disagreement unless the results agree."""
    if not agrees:
        raise Disagreement(otherwise)


@dataclass(frozen=True)
class Spread:
    """The median, lowest and highest value of the rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """How many times as fast `of` is as `beside`; each is an implementation or a group. `target` is the wanted
    ratio, or None."""

    of: str
    beside: str
    target: float | None = None


@dataclass(frozen=True)
class Case:
    """One piece of work and the implementations that do it.

    Attributes:
        name: distinguishes the case within its task.
        calls: the implementations, by name. What a call returns is passed to `check`.
        comparisons: the ratios to report.
        groups: names for several implementations; a comparison uses the fastest of them.
        amount, unit: how much one call does, for example 4 "images".
        flops: FLOPs of a call, for the implementations where they are known. If both sides of a comparison
            have them, the ratio is one of FLOPs per second, otherwise one of seconds.
        check: takes the results by name, and returns named figures of how well they agree. It raises
            Disagreement if they do not, since a speed-up counts only for equal results.
        warm_up: called once before the first round. Without it, every implementation is called once.
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
        """A case that compares `ours` with each of the peers."""
        return cls(name, {"ours": ours, **peers}, tuple(Comparison("ours", peer) for peer in peers), **more)

    def get_warm(self) -> None:
        for call in self.calls.values() if self.warm_up is None else [self.warm_up]:
            call()


class Rounds:
    """The times and results of a case's calls."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.seconds: dict[str, list[float]] = {name: [] for name in case.calls}
        self.results: dict[str, Any] = {}

    def take(self, *names: str) -> None:
        """Call each of these once, and time it."""
        for name in names:
            start = perf_counter()
            self.results[name] = self.case.calls[name]()
            self.seconds[name].append(perf_counter() - start)

    def fastest(self, name: str) -> str:
        """The implementation of a group with the least median, or the implementation of that name."""
        return min(self.case.groups.get(name, (name,)), key=lambda each: median(self.seconds[each]))

    def ratio(self, comparison: Comparison) -> Spread:
        flops, of, beside = self.case.flops, self.fastest(comparison.of), self.fastest(comparison.beside)
        work = flops[of] / flops[beside] if of in flops and beside in flops else 1.0
        return Spread.of(work * theirs / ours
                         for ours, theirs in zip(self.seconds[of], self.seconds[beside], strict=True))

    def summary(self) -> dict[str, Any]:
        """All figures, for JSON. Raises Disagreement if the results do not agree."""
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
    """Warm up, time every call in turn `rounds` times, and return `Rounds.summary`."""
    case.get_warm()
    timed = Rounds(case)
    for _ in range(rounds):
        timed.take(*case.calls)
    return timed.summary()
