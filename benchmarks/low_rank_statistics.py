"""Low-rank scores of lora_A and lora_B: an r x r Gram matrix against stored activations and an SVD of all outputs.

Both ways start from the same batches of module inputs ``X`` and end with the reduced factors ``(A^, B^)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_nlsr.config import NLSRConfig
from peft_nlsr.lowrank import LowRank
from peft_nlsr.scores import low_rank_factors, rank_kept

from .timing import alternate, compared, timed

Pair = tuple[Tensor, Tensor]


def measure(config: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per shape: seconds, ratio and relative difference to the exact SVD and to the release's random one."""
    return [_measure_shape(shape, config) for shape in config["shapes"]]


def _measure_shape(shape: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    update, batches = _random_module(shape, config)
    settings = NLSRConfig(sparsity=config["sparsity"], low_rank_rule=config["low_rank_rule"])
    kept = rank_kept(update.rank, settings)
    figures, ours, released = alternate(
        lambda: _from_gram(batches, update, kept),
        lambda: _from_activations(batches, update, kept, _randomised),
        repeats=config["repeats"],
    )
    # Once only: it takes minutes at full size, hundreds of times what a busy moment could add.
    exact_times, exact = timed(lambda: _from_activations(batches, update, kept, _exact))
    own_times = {"cpu": figures["ours_s"], "wall": figures["ours_wall_s"]}
    return {
        "name": shape["name"],
        "kept": kept,
        **compared(own_times, exact_times),
        "error": _difference(ours, exact),
        "released_s": figures["baseline_s"],
        "ratio_released": figures["ratio"],
        "ratio_released_range": figures["ratio_range"],
        "error_released": _difference(released, exact),
        "stored_mb": 4 * update.rank**2 * 2 / 1e6,
        "baseline_stored_mb": 4 * config["tokens"] * (shape["d_in"] + update.rank + shape["d_out"]) / 1e6,
    }


def _random_module(shape: dict[str, Any], config: dict[str, Any]) -> tuple[LowRank, list[Tensor]]:
    """A module and its inputs, whose power falls off over the features as it does in language models."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    d_in, d_out, rank = shape["d_in"], shape["d_out"], config["rank"]
    update = LowRank(draw(rank, d_in) / d_in**0.5, draw(d_out, rank) / rank**0.5)
    power = torch.arange(1, d_in + 1) ** -0.5
    return update, list((draw(config["tokens"], d_in) * power).split(config["batch_tokens"]))


def _from_gram(batches: list[Tensor], update: LowRank, kept: int) -> Pair:
    gram = torch.zeros(update.rank, update.rank, dtype=torch.float64)
    for x in batches:
        z = x @ update.A.T
        gram += (z.T @ z).double()
    return low_rank_factors(update, gram, kept)


def _from_activations(
    batches: list[Tensor], update: LowRank, kept: int, right_vectors: Callable[[Tensor, int], Tensor]
) -> Pair:
    X = torch.cat(batches)
    H = X @ update.A.T
    V_A = right_vectors(H, kept)
    V_B = right_vectors(H @ update.B.T, kept)
    return (V_A @ V_A.T) @ update.A, (V_B @ V_B.T) @ update.B


def _randomised(score: Tensor, kept: int) -> Tensor:
    """As released: ``svd_lowrank`` with 20 iterations."""
    return torch.svd_lowrank(score, q=kept, niter=20)[2]


def _exact(score: Tensor, kept: int) -> Tensor:
    return torch.linalg.svd(score, full_matrices=False).Vh[:kept].T


def _difference(found: Pair, wanted: Pair) -> float:
    """The larger relative Frobenius difference of the two factors."""
    return max(float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True))
