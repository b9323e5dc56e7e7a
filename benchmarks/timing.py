"""Times of two ways to compute the same thing, taken in turn so that a busy machine slows both alike.

CPU time counts, because other work on the machine hardly touches it; on one thread it is the wall time of an idle
machine. Wall time is noted beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

Ours = TypeVar("Ours")
Theirs = TypeVar("Theirs")


def alternate(
    ours: Callable[[], Ours], baseline: Callable[[], Theirs], *, repeats: int
) -> tuple[dict[str, Any], Ours, Theirs]:
    """Median times of both, the ratio of CPU times and its range over the pairs, and the last result of each."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        own, own_result = timed(ours)
        other, other_result = timed(baseline)
        runs.append(compared(own, other))
    ratios = [run["ratio"] for run in runs]
    return {**medians(runs), "ratio_range": [min(ratios), max(ratios)]}, own_result, other_result


def timed(action: Callable[[], Ours]) -> tuple[dict[str, float], Ours]:
    """Seconds that one call took, as ``cpu`` time of this process and as ``wall`` time, and its result."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}, result


def compared(ours: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    """One row's times: CPU seconds of both, their ratio, wall seconds of both."""
    return {
        "ours_s": ours["cpu"],
        "baseline_s": baseline["cpu"],
        "ratio": baseline["cpu"] / ours["cpu"],
        "ours_wall_s": ours["wall"],
        "baseline_wall_s": baseline["wall"],
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the runs."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}
