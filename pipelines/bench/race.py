"""Contestants that take turns, so that other work on the machine affects all of them alike.

Absolute speeds say more about the machine than about the code. What is compared is the median of the ratios within a
round.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def race(ways: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Run every way once in each round; return by name the result of each round."""
    results: dict[str, list[Result]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            results[name].append(run())
    return results


def median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over the rounds of our result divided by the other's in the same round."""
    return statistics.median(our / other for our, other in zip(ours, others, strict=True))


def seconds(work: Callable[[], object]) -> float:
    """Return how long a piece of work took, in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
