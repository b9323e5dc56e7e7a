"""Each way to restore a module equals its dense formula, cut to rank by a dense SVD where it is cut."""

from collections.abc import Callable
from types import SimpleNamespace

import oracles
import pytest
import torch
from oracles import gap, module_inputs, norm_on_inputs, pad, random_factors, random_rows
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_nlsr.edits
from peft_nlsr import directions
from peft_nlsr.calibration import FrequentDirections
from peft_nlsr.config import NLSRConfig
from peft_nlsr.directions import TOLERANCE
from peft_nlsr.edits import NormalEquations, masked, restore_one_shot, restore_sum, restore_swap, top_directions
from peft_nlsr.examples import Example
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.lowrank import LowRank
from peft_nlsr.realign import plan
from peft_nlsr.scores import InputSketch, Moment

D_OUT, D_IN, RANK = 10, 14, 4
SINGLE = 1e-5  # the factors are float32


def update(rank: int = RANK, scale: float = 2.0, *, seed: int = 0) -> LowRank:
    return LowRank(*random_factors(D_OUT, D_IN, rank, seed=seed), scale)


def dense(u: LowRank) -> Tensor:
    return u.scale * u.B.double() @ u.A.double()


def random_masks(share: float = 0.3, *, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(RANK, D_IN, generator=generator) < share,
        torch.rand(D_OUT, RANK, generator=generator) < share,
    )


MASKS = {
    "random": random_masks(),
    "empty": random_masks(-1.0),
    "full": random_masks(2.0),
    "only-A": (random_masks()[0], random_masks(-1.0)[1]),
}
SCALES = {"same-scale": 2.0, "other-scale": 0.5}

by_masks = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
by_scale = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)


def raw(u: LowRank) -> tuple[Tensor, Tensor, float]:
    return u.A, u.B, u.scale


# Entry-wise edits


@by_masks
def test_masked_factors_and_their_complement_add_up(masks: tuple[Tensor, Tensor]) -> None:
    inside, outside = masked(update(), masks), masked(update(), masks, inside=False)
    assert torch.equal(inside.A + outside.A, update().A) and torch.equal(inside.B + outside.B, update().B)
    assert not (inside.A[~masks[0]].any() or outside.A[masks[0]].any())
    assert not (inside.B[~masks[1]].any() or outside.B[masks[1]].any())


@by_scale
@by_masks
def test_the_exact_sum_is_equation_12_at_twice_the_rank(masks: tuple[Tensor, Tensor], scale: float) -> None:
    tuned, reference = update(), update(scale=scale, seed=1)
    found, error = restore_sum(tuned, masked(reference, masks), masks, compress=False)
    assert gap(dense(found), oracles.sum_dense(*raw(tuned), *raw(reference), *masks)) < SINGLE
    assert (found.rank, found.scale, error) == (2 * RANK, tuned.scale, 0.0)


@by_scale
@by_masks
def test_the_compressed_sum_is_its_best_approximation_of_rank_r(masks: tuple[Tensor, Tensor], scale: float) -> None:
    tuned, reference = update(), update(scale=scale, seed=1)
    found, error = restore_sum(tuned, masked(reference, masks), masks, compress=True)
    exact = oracles.sum_dense(*raw(tuned), *raw(reference), *masks)
    best = oracles.truncate(exact, RANK)
    assert gap(dense(found), best) < SINGLE
    assert (found.rank, found.scale) == (RANK, tuned.scale)
    assert error == pytest.approx(gap(best, exact), abs=SINGLE)


@by_masks
def test_given_inputs_the_compressed_sum_is_the_best_one_for_them(masks: tuple[Tensor, Tensor]) -> None:
    tuned, reference = update(), update(seed=1)
    generator = torch.Generator().manual_seed(3)
    sketch = InputSketch(
        (10.0 * torch.randn(RANK, D_IN, generator=generator)).bfloat16(), torch.rand(D_IN, generator=generator)
    )
    found, error = restore_sum(tuned, masked(reference, masks), masks, compress=True, inputs=sketch)
    exact = oracles.sum_dense(*raw(tuned), *raw(reference), *masks)
    M = sketch.rows.double().T @ sketch.rows.double() + torch.diag(sketch.rest.double())
    best = oracles.truncate_on_inputs(exact, M, RANK)
    assert gap(dense(found), best) < 10 * SINGLE
    assert error == pytest.approx(oracles.norm_on_inputs(best - exact, M) / oracles.norm_on_inputs(exact, M), abs=1e-5)


@by_masks
def test_the_swap_takes_the_references_entries_inside_the_masks(masks: tuple[Tensor, Tensor]) -> None:
    tuned, reference = update(), update(seed=1)
    found = restore_swap(tuned, masked(reference, masks), masks)
    A, B = oracles.swap(tuned.A, tuned.B, reference.A, reference.B, *masks)
    assert torch.equal(found.A.double(), A) and torch.equal(found.B.double(), B)
    assert found.scale == tuned.scale


def test_a_full_swap_is_the_reference_whatever_its_scale() -> None:
    reference = update(scale=0.5, seed=1)
    assert gap(dense(restore_swap(update(), reference, MASKS["full"])), dense(reference)) < SINGLE


def test_a_swap_keeps_the_dtype_and_the_bits_of_what_it_leaves() -> None:
    masks, half = MASKS["random"], LowRank(update().A.bfloat16(), update().B.bfloat16(), 2.0)
    found = restore_swap(half, masked(update(seed=1), masks), masks)
    assert found.A.dtype == found.B.dtype == torch.bfloat16
    assert torch.equal(found.A[~masks[0]], half.A[~masks[0]])


@pytest.mark.parametrize("update_as", ["sum", "swap"])
def test_an_adapter_on_a_gpu_meets_a_patch_on_the_cpu(update_as: str) -> None:
    with FakeTensorMode():
        tuned = LowRank(torch.zeros(RANK, D_IN, device="cuda"), torch.zeros(D_OUT, RANK, device="cuda"), 2.0)
        patch = LowRank(torch.zeros(RANK, D_IN), torch.zeros(D_OUT, RANK), 1.0)
        masks = (torch.ones(RANK, D_IN, dtype=torch.bool), torch.ones(D_OUT, RANK, dtype=torch.bool))
        if update_as == "swap":
            found = restore_swap(tuned, patch, masks)
        else:
            found, _ = restore_sum(tuned, patch, masks, compress=False)
        assert found.A.device.type == found.B.device.type == "cpu"


# One-shot least squares


def inputs(*, seed: int, tokens: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, D_IN, generator=generator).double() * torch.logspace(0, -1.5, D_IN).double()


def second_moment(X: Tensor) -> Tensor:
    return X.T @ X / len(X)


def full(X: Tensor) -> Moment:
    return Moment(full=X.T @ X).over(len(X))


def sketched(X: Tensor, rows: int) -> Moment:
    sketch = FrequentDirections(D_IN, rows)
    sketch.add(X)
    return sketch.moment().over(len(X))


def sketch_matrix(moment: Moment) -> Tensor:
    assert moment.rows is not None
    return moment.rows.T @ moment.rows


def one_shot_on_inputs(dW_e: Tensor, C_s: Tensor, C_u: Tensor, weight: float, ridge: float) -> tuple[Tensor, float]:
    """The dense solution cut to rank r for the inputs it was solved on, and the relative error of the cut."""
    exact = oracles.one_shot_dense(dense(update()), dW_e, C_s, C_u, weight, ridge)
    M = C_s + weight * C_u
    M = M + ridge * M.diagonal().mean() * torch.eye(D_IN, dtype=torch.float64)
    best = oracles.truncate_on_inputs(exact, M, RANK)
    return best, norm_on_inputs(exact - best, M) / norm_on_inputs(exact, M)


REFERENCES = {
    "base-model": None,
    "same-rank": update(seed=1),
    "other-rank-and-scale": update(7, 0.3, seed=1),
    "rank-one": update(1, seed=1),
}
SAFETY, UTILITY = inputs(seed=2), inputs(seed=3)


@pytest.mark.parametrize("weight", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_one_shot_is_the_dense_solution_cut_on_its_inputs(
    reference: LowRank | None, ridge: float, weight: float
) -> None:
    found, error = restore_one_shot(
        update(), reference, full(SAFETY), full(UTILITY), utility_weight=weight, ridge=ridge
    )
    dW_e = torch.zeros(D_OUT, D_IN) if reference is None else dense(reference)
    best, lost = one_shot_on_inputs(dW_e, second_moment(SAFETY), second_moment(UTILITY), weight, ridge)
    assert gap(dense(found), best) < SINGLE
    assert (found.rank, found.scale) == (RANK, 2.0)
    assert error == pytest.approx(lost, abs=1e-6)


@pytest.mark.parametrize("rows", [D_IN, 2 * D_IN], ids=["as-many-rows-as-inputs", "more-rows"])
def test_one_shot_with_a_lossless_sketch_equals_full_moments(rows: int) -> None:
    settings = {"utility_weight": 0.5, "ridge": 1e-2}
    exact, error = restore_one_shot(update(), update(seed=1), full(SAFETY), full(UTILITY), **settings)
    moments = sketched(SAFETY, rows), sketched(UTILITY, rows)
    found, sketch_error = restore_one_shot(update(), update(seed=1), *moments, **settings)
    assert gap(dense(found), dense(exact)) < SINGLE
    assert sketch_error == pytest.approx(error, abs=SINGLE)


@pytest.mark.parametrize("kinds", ["both-sketched", "safety-sketched", "utility-sketched"])
def test_one_shot_with_a_small_sketch_is_the_solution_for_what_the_sketch_says(kinds: str) -> None:
    safety = full(SAFETY) if kinds == "utility-sketched" else sketched(SAFETY, 5)
    utility = full(UTILITY) if kinds == "safety-sketched" else sketched(UTILITY, 6)
    C_s, C_u = (m.full if m.full is not None else sketch_matrix(m) for m in (safety, utility))
    found, _ = restore_one_shot(update(), update(seed=1), safety, utility, utility_weight=0.5, ridge=1e-2)
    best, _ = one_shot_on_inputs(dense(update(seed=1)), C_s, C_u, 0.5, 1e-2)
    assert gap(dense(found), best) < SINGLE


def test_one_shot_towards_the_adapter_itself_changes_nothing() -> None:
    found, error = restore_one_shot(update(), update(), full(SAFETY), full(UTILITY), utility_weight=1.0, ridge=1e-3)
    assert gap(dense(found), dense(update())) < SINGLE
    assert error < 1e-6


def test_a_planned_one_shot_realignment_is_the_dense_solution_of_every_module(
    make_pico_lora: Callable[..., PeftModel],
) -> None:
    tuned, safe = make_pico_lora(), make_pico_lora(seed=1, r=6)
    rows = {"calibration": random_rows(9, seed=1), "utility": random_rows(7, seed=2)}
    form = {"update": "least_squares", "least_squares_form": "one_shot"}
    config = NLSRConfig(**form, utility_weight=0.7, ridge=0.1, screening=False)
    found = plan(
        tuned,
        config,
        reference=LiveAdapter(safe).snapshot(),
        tokenizer=SimpleNamespace(pad_token_id=0, decode=lambda ids, skip_special_tokens: "no"),
        progress=False,
        **{key: [Example(tuple(p), tuple(a)) for p, a in value] for key, value in rows.items()},
    )
    batches = [pad(value) for value in rows.values()]
    X_s, X_u = (module_inputs(tuned, "default", [b], [b["attention_mask"]]) for b in batches)
    own, theirs = LiveAdapter(tuned).snapshot(), LiveAdapter(safe).snapshot()
    assert found.method == "one_shot" and set(found.updates) == set(own)
    for name, mine in found.updates.items():
        C_s, C_u = second_moment(X_s[name]), second_moment(X_u[name])
        exact = oracles.one_shot_dense(dense(own[name]), dense(theirs[name]), C_s, C_u, 0.7, 0.1)
        M = C_s + 0.7 * C_u
        M = M + 0.1 * M.diagonal().mean() * torch.eye(len(M))
        assert gap(dense(mine), oracles.truncate_on_inputs(exact, M, own[name].rank)) < SINGLE


# The normal equations of the two-teacher form


def teaching(seed: int) -> dict[str, Tensor]:
    """Inputs in the repaired model and in the teacher, and token weights that sum to one."""
    weights = torch.rand(30, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    return {
        "x": inputs(seed=seed, tokens=30),
        "teacher": inputs(seed=seed + 50, tokens=30),
        "w": weights / weights.sum(),
    }


def base_and_teachers(seed: int, rank: int) -> tuple[Tensor, Tensor, LowRank]:
    W0 = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(seed)).double()
    return W0, W0 + dense(update(3, seed=seed + 1)), update(rank, seed=seed + 2)


@pytest.mark.parametrize("batches", [1, 4], ids=["one-batch", "four-batches"])
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("rank", [1, 4, 12], ids=["rank-1", "rank-4", "rank-above-both-sides"])
def test_the_normal_equations_give_the_dense_solution_of_each_module(rank: int, ridge: float, batches: int) -> None:
    weight, safety, utility = 0.4, teaching(20), teaching(30)
    modules = {"q_proj": base_and_teachers(1, rank), "k_proj": base_and_teachers(4, rank)}
    sums = NormalEquations.zeros(D_IN, dict.fromkeys(modules, D_OUT), torch.device("cpu"))
    for data, share, of_safety in ((safety, 1.0, True), (utility, weight, False)):
        for part in torch.arange(30).chunk(batches):
            x, taught = data["x"][part], data["teacher"][part]
            wanted = {
                name: taught @ (Ws if of_safety else W0 + dense(tuned)).T - x @ W0.T
                for name, (W0, Ws, tuned) in modules.items()
            }
            sums.add(x, wanted, share * data["w"][part])
    solved = sums.solve({name: tuned for name, (_, _, tuned) in modules.items()}, ridge=ridge, seed=0)
    for name, (W0, Ws, tuned) in modules.items():
        found, error, _ = solved[name]
        exact, M, best = oracles.two_teacher_module_dense(
            W0, Ws, W0 + dense(tuned), *safety.values(), *utility.values(), weight, ridge, rank=rank
        )
        assert gap(dense(found), best) < SINGLE
        assert (found.rank, found.scale) == (rank, tuned.scale)
        assert error == pytest.approx(norm_on_inputs(exact - best, M) / norm_on_inputs(exact, M), abs=1e-6)


def test_teachers_that_agree_are_followed_exactly() -> None:
    tuned, x = update(), SAFETY
    sums = NormalEquations.zeros(D_IN, {"q_proj": D_OUT}, torch.device("cpu"))
    sums.add(x, {"q_proj": x @ dense(tuned).T}, torch.full((len(x),), 1.0 / len(x)))
    found, error, _ = sums.solve({"q_proj": tuned}, ridge=1e-3, seed=0)["q_proj"]
    assert gap(dense(found), dense(tuned)) < SINGLE
    assert error < 1e-6


def test_the_solution_shares_its_size_evenly_between_the_factors() -> None:
    sums = NormalEquations.zeros(D_IN, {"q_proj": D_OUT}, torch.device("cpu"))
    sums.add(SAFETY, {"q_proj": SAFETY @ dense(update()).T}, torch.ones(len(SAFETY)))
    found, _, _ = sums.solve({"q_proj": update()}, ridge=1e-3, seed=0)["q_proj"]
    assert gap(found.A.norm(dim=1), found.B.norm(dim=0)) < SINGLE


def test_a_wanted_output_of_zero_gives_the_zero_update() -> None:
    nothing = LowRank(torch.zeros(RANK, D_IN), torch.zeros(D_OUT, RANK), 2.0)
    sums = NormalEquations.zeros(D_IN, {"q_proj": D_OUT}, torch.device("cpu"))
    sums.add(SAFETY, {"q_proj": torch.zeros(len(SAFETY), D_OUT).double()}, torch.ones(len(SAFETY)))
    found, error, _ = sums.solve({"q_proj": nothing}, ridge=1e-3, seed=0)["q_proj"]
    assert not dense(found).any() and error == 0.0


# Singular vectors


def decaying(m: int, n: int) -> Tensor:
    left, right = (
        torch.linalg.qr(torch.randn(k, min(m, n), generator=torch.Generator().manual_seed(k)).double()).Q
        for k in (m, n)
    )
    return left @ torch.diag(0.7 ** torch.arange(min(m, n)).double()) @ right.T


def falling(n: int, decay: float) -> Tensor:
    """Singular values ``i^-decay``: slowly, as those of real activations."""
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(k)).double()).Q for k in (1, 2)
    )
    return left @ torch.diag(torch.arange(1, n + 1).double() ** -decay) @ right.T


@pytest.mark.parametrize("shape", [(60, 50), (50, 60), (60, 12)], ids=["tall", "wide", "narrower-than-oversampling"])
def test_large_matrices_get_the_same_directions_by_block_lanczos(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = decaying(*shape)
    exact, error, _ = top_directions(matrix, 2, seed=0)
    monkeypatch.setattr(peft_nlsr.edits, "EXACT_SVD_SIDE", 8)
    found, found_error, off = top_directions(matrix, 2, seed=0)
    assert off <= TOLERANCE
    assert gap(found @ found.T @ matrix, exact @ exact.T @ matrix) < 2.0 * off + 1e-12
    assert found_error == pytest.approx(error, abs=1e-6)
    assert torch.equal(found, top_directions(matrix, 2, seed=0)[0])


@pytest.mark.parametrize("decay", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("rank", [4, 24])
def test_slowly_decaying_singular_values_are_cut_as_exactly_as_it_says(
    rank: int, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = falling(400, decay)
    monkeypatch.setattr(peft_nlsr.edits, "EXACT_SVD_SIDE", 8)
    found, _, off = top_directions(matrix, rank, seed=0)
    assert 0.0 < off <= TOLERANCE
    best = oracles.truncate(matrix, rank)
    assert 0.25 * off < gap(found @ found.T @ matrix, best) < 2.0 * off


def test_what_iteration_does_not_find_is_decomposed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = falling(200, 0.25)
    monkeypatch.setattr(peft_nlsr.edits, "EXACT_SVD_SIDE", 8)
    monkeypatch.setattr(directions, "MOST_ROUNDS", 1)
    found, _, off = top_directions(matrix, 4, seed=0)
    assert off == 0.0
    assert gap(found @ found.T @ matrix, oracles.truncate(matrix, 4)) < 1e-10


def test_the_solution_carries_the_measured_error_of_its_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = falling(400, 0.5)
    sums = NormalEquations(torch.eye(400).double(), {"q_proj": matrix})
    nothing = LowRank(torch.zeros(24, 400), torch.zeros(400, 24), 2.0)
    assert sums.solve({"q_proj": nothing}, ridge=1e-9, seed=0)["q_proj"].solver_error == 0.0
    monkeypatch.setattr(peft_nlsr.edits, "EXACT_SVD_SIDE", 8)
    found = sums.solve({"q_proj": nothing}, ridge=1e-9, seed=0)["q_proj"]
    assert 0.0 < found.solver_error <= TOLERANCE
    assert gap(dense(found.update), oracles.truncate(matrix, 24)) < 2.0 * found.solver_error


def test_missing_directions_are_zero_columns() -> None:
    found, error, off = top_directions(decaying(3, 20), 5, seed=0)
    assert found.shape == (3, 5) and not found[:, 3:].any()
    assert error < 1e-7 and off == 0.0


def test_the_error_is_the_share_of_the_matrix_outside_the_directions() -> None:
    matrix = decaying(20, 30)
    found, error, _ = top_directions(matrix, 4, seed=0)
    assert error == pytest.approx(gap(found @ found.T @ matrix, matrix), rel=1e-9)
    assert gap(found @ found.T @ matrix, oracles.truncate(matrix, 4)) < 1e-10
