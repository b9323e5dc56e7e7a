"""Scores and masks from small statistics equal those from stored activations, and masks keep what they promise."""

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from oracles import gap, random_factors
from torch import Tensor

from peft_nlsr.config import NLSRConfig
from peft_nlsr.errors import CalibrationError
from peft_nlsr.lowrank import LowRank
from peft_nlsr.scores import SCORES, InputSketch, ModuleStatistics, Moment, low_rank_factors, rank_kept, safety_masks

D_OUT, D_IN, RANK, TOKENS = 14, 24, 5, 60
BFLOAT16 = 2**-8  # its relative rounding error
SINGLE = 1e-6  # scores are exact in float64 and then rounded to float32


def reference(rank: int = RANK, *, seed: int = 0) -> LowRank:
    return LowRank(*random_factors(D_OUT, D_IN, rank, seed=seed), 2.0)


def inputs(tokens: int = TOKENS, *, seed: int = 1) -> Tensor:
    """Inputs whose directions differ in size, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, D_IN, generator=generator).double() * torch.logspace(0, -2, D_IN).double()


def gradients(*, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [random_factors(D_OUT, D_IN, RANK, seed=seed + k) for k in range(6)]


def statistics(update: LowRank, X: Tensor, samples: list[tuple[Tensor, Tensor]] | None = None) -> ModuleStatistics:
    Z = X @ update.A.double().T
    sums = None if samples is None else [sum(g[i].double().abs() for g in samples) for i in (0, 1)]
    return ModuleStatistics(len(X), Z.T @ Z, X.square().sum(dim=0), *(sums or (None, None)))


def config(score: str = "low_rank", **changes: Any) -> NLSRConfig:
    return NLSRConfig(score=score, **changes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(update: LowRank, used: ModuleStatistics, settings: NLSRConfig) -> tuple[Tensor, Tensor]:
    return safety_masks(update, used, settings, generator=generator())


def oracle_scores(score: str, update: LowRank, settings: NLSRConfig) -> tuple[Tensor, Tensor]:
    """The score of each factor as its paper defines it, from activations and single gradients."""
    A, B = update.A, update.B
    if score == "low_rank":
        rank = oracles.rank_kept_paper if settings.low_rank_rule == "paper" else released_rank
        A_hat, B_hat = oracles.low_rank_reduce(A, B, inputs(), rank(update.rank, settings.sparsity))
        return oracles.magnitude(A_hat), oracles.magnitude(B_hat)
    if score == "wanda":
        return oracles.wanda_scores(A, B, inputs())
    if score == "magnitude":
        return oracles.magnitude(A), oracles.magnitude(B)
    of_A, of_B = zip(*gradients(), strict=True)
    return oracles.snip_scores(A, of_A), oracles.snip_scores(B, of_B)


def released_rank(rank: int, sparsity: float) -> int:
    return oracles.rank_kept_released(D_OUT, rank, sparsity)


SPARSITIES = [0.2, 0.5, 0.8, 0.97]
MEASURED = ["low_rank", "wanda", "snip", "preference_snip", "magnitude"]


# Scores


@pytest.mark.parametrize("score", MEASURED)
def test_scores_equal_the_dense_ones(score: str) -> None:
    update, settings = reference(), config(score)
    found = SCORES[score](update, statistics(update, inputs(), gradients()), settings, generator())
    for mine, expected in zip(found, oracle_scores(score, update, settings), strict=True):
        assert gap(mine, expected) < SINGLE


@pytest.mark.parametrize("kept", range(1, RANK + 1))
def test_low_rank_factors_equal_actsvd_on_stored_activations(kept: int) -> None:
    update, X = reference(), inputs()
    found = low_rank_factors(update, statistics(update, X).z_gram, kept)
    for mine, expected in zip(found, oracles.low_rank_reduce(update.A, update.B, X, kept), strict=True):
        assert gap(mine, expected) < SINGLE


def test_low_rank_factors_equal_actsvd_when_the_rank_exceeds_the_outputs() -> None:
    update, X = LowRank(*random_factors(3, D_IN, RANK, seed=0)), inputs()
    found = low_rank_factors(update, statistics(update, X).z_gram, 2)
    for mine, expected in zip(found, oracles.low_rank_reduce(update.A, update.B, X, 2), strict=True):
        assert gap(mine, expected) < SINGLE


def test_fewer_tokens_than_kept_directions_leave_the_outputs_on_them_unchanged() -> None:
    update, X = reference(), inputs(tokens=2)
    A_hat, B_hat = low_rank_factors(update, statistics(update, X).z_gram, 4)
    H = X @ update.A.double().T
    assert gap(X @ A_hat.double().T, H) < SINGLE
    assert gap(H @ B_hat.double().T, H @ update.B.double().T) < SINGLE


def test_reducing_by_all_directions_changes_nothing() -> None:
    update = reference()
    A_hat, B_hat = low_rank_factors(update, statistics(update, inputs()).z_gram, RANK)
    assert gap(A_hat, update.A) < SINGLE and gap(B_hat, update.B) < SINGLE


def test_a_zero_factor_reduces_to_zero() -> None:
    update = LowRank(reference().A, torch.zeros(D_OUT, RANK))
    _, B_hat = low_rank_factors(update, statistics(update, inputs()).z_gram, 2)
    assert not B_hat.any()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("rank", [1, 2, 5, 8, 16, 128])
def test_kept_ranks_are_those_of_paper_and_release(rank: int, sparsity: float) -> None:
    assert rank_kept(rank, config(sparsity=sparsity)) == oracles.rank_kept_paper(rank, sparsity)
    released = oracles.rank_kept_released(1000, rank, sparsity)
    assert rank_kept(rank, config(sparsity=sparsity, low_rank_rule="released")) == max(1, released)


@pytest.mark.parametrize("score", MEASURED)
def test_the_unit_of_the_data_does_not_matter_to_the_masks(score: str) -> None:
    update = reference()
    small, large = (statistics(update, unit * inputs(), gradients()) for unit in (1.0, 64.0))
    for one, other in zip(masks(update, small, config(score)), masks(update, large, config(score)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("score", ["snip", "preference_snip"])
def test_a_gradient_score_without_gradients_says_how_to_get_them(score: str) -> None:
    update = reference()
    with pytest.raises(CalibrationError, match=rf"{score}.*gradients='{score}'"):
        masks(update, statistics(update, inputs()), config(score))


# Masks


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("unit", ["tensor", "row"])
@pytest.mark.parametrize("score", MEASURED)
def test_masks_equal_the_dense_ones(score: str, unit: str, sparsity: float) -> None:
    update, settings = reference(), config(score, mask_unit=unit, sparsity=sparsity)
    cut = oracles.mask_row if unit == "row" else oracles.top_k_tensor
    found = masks(update, statistics(update, inputs(), gradients()), settings)
    for mine, expected in zip(found, oracle_scores(score, update, settings), strict=True):
        assert torch.equal(mine, cut(expected, sparsity))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_released_rule_equals_the_released_threshold(sparsity: float) -> None:
    update, settings = reference(), config(sparsity=sparsity, low_rank_rule="released")
    found = masks(update, statistics(update, inputs()), settings)
    for mine, expected in zip(found, oracle_scores("low_rank", update, settings), strict=True):
        assert torch.equal(mine, oracles.released_threshold_tensor(expected, sparsity))


@pytest.mark.parametrize("sparsity", [0.0, *SPARSITIES])
@pytest.mark.parametrize("score", [*MEASURED, "random"])
def test_a_tensor_mask_keeps_its_exact_share(score: str, sparsity: float) -> None:
    update = reference()
    for mask in masks(update, statistics(update, inputs(), gradients()), config(score, sparsity=sparsity)):
        assert int(mask.sum()) == mask.numel() - int(mask.numel() * sparsity)


@pytest.mark.parametrize("sparsity", [0.0, *SPARSITIES])
def test_a_row_mask_keeps_the_same_share_of_each_row(sparsity: float) -> None:
    update = reference()
    for mask in masks(update, statistics(update, inputs()), config("wanda", mask_unit="row", sparsity=sparsity)):
        columns = mask.shape[1]
        assert mask.sum(dim=1).tolist() == [columns - int(columns * sparsity)] * len(mask)


@pytest.mark.parametrize("unit", ["tensor", "row"])
def test_equal_scores_go_to_the_earlier_entry(unit: str) -> None:
    A = torch.tensor([[1.0, 3.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    update = LowRank(A, torch.ones(2, 2))
    found, _ = masks(
        update, statistics(update, torch.ones(1, 4).double()), config("magnitude", mask_unit=unit, sparsity=0.5)
    )
    expected = {"tensor": [[0, 1, 0, 0], [1, 1, 1, 0]], "row": [[1, 1, 0, 0], [1, 1, 0, 0]]}
    assert found.int().tolist() == expected[unit]


def test_a_smaller_sparsity_only_adds_entries() -> None:
    update = reference()
    used = statistics(update, inputs())
    for score in ("wanda", "magnitude", "random"):
        few, many = (masks(update, used, config(score, sparsity=s)) for s in (0.8, 0.5))
        assert not any(bool((a & ~b).any()) for a, b in zip(few, many, strict=True))


def test_a_released_threshold_of_zero_drops_a_seeded_choice_of_the_zeros() -> None:
    A = torch.zeros(4, 10)
    A[0] = torch.arange(1, 11)
    update = LowRank(A, torch.ones(3, 4))
    settings = config(sparsity=0.5, low_rank_rule="released")
    used = statistics(update, torch.eye(10).double())
    found, again = masks(update, used, settings)[0], masks(update, used, settings)[0]
    assert found[0].all()
    assert int((~found).sum()) == 20
    assert torch.equal(found, again)
    other = safety_masks(update, used, settings, generator=generator(1))[0]
    assert not torch.equal(found, other)


def test_random_masks_depend_on_the_seed_and_on_nothing_else() -> None:
    settings = config("random", sparsity=0.5)
    one = masks(reference(seed=0), statistics(reference(seed=0), inputs()), settings)
    same = masks(reference(seed=9), statistics(reference(seed=9), 3 * inputs(seed=4)), settings)
    other = safety_masks(reference(), statistics(reference(), inputs()), settings, generator=generator(1))
    for i in (0, 1):
        assert torch.equal(one[i], same[i]) and not torch.equal(one[i], other[i])


# Second moments

VECTORS = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(5)).double()


def test_a_full_and_a_sketched_moment_compute_the_same() -> None:
    X = inputs(tokens=8)
    full, rows = Moment(full=X.T @ X), Moment(rows=X, error=0.25)
    assert gap(rows.right_multiply(VECTORS), full.right_multiply(VECTORS)) < 1e-12
    assert rows.trace() == pytest.approx(full.trace())
    assert gap(rows.over(8).right_multiply(VECTORS), full.over(8).right_multiply(VECTORS)) < 1e-12
    assert gap(full.over(8).right_multiply(VECTORS), VECTORS @ X.T @ X / 8) < 1e-12
    assert rows.over(8).error == 0.25


@pytest.mark.parametrize("both", [True, False], ids=["both", "neither"])
def test_a_moment_is_either_full_or_sketched(both: bool) -> None:
    with pytest.raises(ValueError, match="either"):
        Moment(full=torch.eye(2) if both else None, rows=torch.eye(2) if both else None)


def with_codes(update: LowRank, X: Tensor) -> ModuleStatistics:
    return replace(statistics(update, X), x_code=X.T @ (X @ update.A.double().T))


@pytest.mark.parametrize("tokens", [TOKENS, RANK - 1], ids=["many-tokens", "fewer-than-directions"])
def test_what_a_reference_saw_of_its_inputs_is_their_nystrom_approximation(tokens: int) -> None:
    X, A = inputs(tokens), reference().A
    sketch = InputSketch.of(with_codes(reference(), X))
    assert sketch is not None
    M = oracles.seen_moment(X, A)
    assert gap(sketch.rows.double().T @ sketch.rows.double() + torch.diag(sketch.rest.double()), M) < 2 * BFLOAT16
    other = torch.randn(3 * RANK, D_IN, generator=generator())
    assert gap(sketch.gram(other), other.double() @ M @ other.double().T) < 2 * BFLOAT16


def test_the_inputs_are_known_exactly_where_the_reference_looks() -> None:
    X, A = inputs(), reference().A.double()
    sketch = InputSketch.of(with_codes(reference(), X))
    assert sketch is not None
    seen = sketch.rows.double().T @ sketch.rows.double()
    assert gap(A @ seen, A @ X.T @ X / len(X)) < 2 * BFLOAT16
    total = seen.diagonal() + sketch.rest.double()
    assert gap(total, X.square().mean(dim=0)) < 2 * BFLOAT16
    assert float(sketch.rest.min()) >= 0.0


def test_inputs_without_codes_or_without_any_signal() -> None:
    assert InputSketch.of(statistics(reference(), inputs())) is None
    silent = InputSketch.of(with_codes(reference(), torch.zeros(4, D_IN, dtype=torch.float64)))
    assert silent is not None
    assert not silent.rows.any() and not silent.rest.any()
