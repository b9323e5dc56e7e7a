"""Cosine between two updates: products of rank x rank against both updates in full."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peft_nlsr.lowrank import LowRank

from .timing import alternate


def measure(config: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per shape, errors against float64; the last row is the sum over the modules of one block."""
    rows = [_measure_shape(shape, config) for shape in config["shapes"]]
    return [*rows, _sum(rows, [shape["modules"] for shape in config["shapes"]])]


def _measure_shape(shape: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    one, other = _random_pair(shape, config["rank"])
    figures, ours, dense = alternate(
        lambda: one.cosine(other), lambda: _flattened_cosine(one, other), repeats=config["repeats"]
    )
    truth = _cosine_in_float64(one, other)
    return {"name": shape["name"], **figures, "error": abs(ours - truth), "baseline_error": abs(dense - truth)}


def _random_pair(shape: dict[str, Any], rank: int) -> tuple[LowRank, LowRank]:
    """A reference and an adapter that was trained on from it."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    A, B = draw(rank, shape["d_in"]), draw(shape["d_out"], rank)
    return LowRank(A, B), LowRank(A + 0.5 * draw(*A.shape), B + 0.5 * draw(*B.shape))


def _flattened_cosine(one: LowRank, other: LowRank) -> float:
    """As released, but in float32: both ``(d_out, d_in)`` updates, flattened."""
    products = (one.B @ one.A).flatten(), (other.B @ other.A).flatten()
    return float(torch.nn.functional.cosine_similarity(*products, dim=0))


def _cosine_in_float64(one: LowRank, other: LowRank) -> float:
    """From the full updates in float64, some rows at a time."""
    sums = torch.zeros(3, dtype=torch.float64)
    for one_b, other_b in zip(one.B.double().split(512), other.B.double().split(512), strict=True):
        left, right = one_b @ one.A.double(), other_b @ other.A.double()
        sums += torch.stack([(left * right).sum(), left.square().sum(), right.square().sum()])
    return float(sums[0] / math.sqrt(sums[1] * sums[2]))


def _sum(rows: list[dict[str, Any]], modules: list[int]) -> dict[str, Any]:
    times = ("ours_s", "baseline_s", "ours_wall_s", "baseline_wall_s")
    total = {key: sum(n * row[key] for n, row in zip(modules, rows, strict=True)) for key in times}
    lows, highs = zip(*(row["ratio_range"] for row in rows), strict=True)
    return {
        "name": f"one block ({sum(modules)} modules)",
        **total,
        "ratio": total["baseline_s"] / total["ours_s"],
        "ratio_range": [min(lows), max(highs)],
        "error": max(row["error"] for row in rows),
        "baseline_error": max(row["baseline_error"] for row in rows),
    }
