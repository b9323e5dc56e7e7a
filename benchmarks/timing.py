"""Wall times of two ways to compute the same thing, taken in turn so that a busy machine slows both alike."""

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
    """Median seconds of both, their ratio and its range over the pairs, and the last result of each."""
    own: list[float] = []
    other: list[float] = []
    for _ in range(repeats):
        seconds, own_result = timed(ours)
        own.append(seconds)
        seconds, other_result = timed(baseline)
        other.append(seconds)
    pairs = [b / a for a, b in zip(own, other, strict=True)]
    figures = {
        "ours_s": statistics.median(own),
        "baseline_s": statistics.median(other),
        "ratio": statistics.median(other) / statistics.median(own),
        "ratio_range": [min(pairs), max(pairs)],
    }
    return figures, own_result, other_result


def timed(action: Callable[[], Ours]) -> tuple[float, Ours]:
    """Seconds that one call took, and its result."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result
