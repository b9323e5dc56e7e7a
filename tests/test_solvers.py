"""Every solver that keeps tokens gives the dense float64 solution, within the error that it measures itself."""

from collections.abc import Iterator

import oracles
import pytest
import torch
from oracles import gap, norm_on_inputs, random_factors
from torch import Tensor

from peft_nlsr import directions, solvers
from peft_nlsr.directions import TOLERANCE
from peft_nlsr.edits import NormalEquations, Solved
from peft_nlsr.lowrank import LowRank
from peft_nlsr.solvers import HeldTokens, Weighted, block_conjugate_gradients
from peft_nlsr.streams import draw_tokens

D_IN, D_OUT, RANK, RIDGE = 96, 80, 4, 0.03


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(*, tokens: int = 400, outliers: int = 0, rank: int = D_IN, decay: float = 0.5) -> Tensor:
    mixing = torch.linalg.qr(drawn(D_IN, D_IN, seed=2)).Q[:rank]
    x = (drawn(tokens, rank, seed=1) * torch.arange(1, rank + 1) ** -decay) @ mixing
    x[:, :outliers] *= 100.0
    return x


INPUTS = {
    "decaying": activations(),
    "outlier-channels": activations(outliers=3),
    "rank-deficient": activations(rank=20),
    "rank-deficient-with-outliers": activations(rank=20, outliers=3),
    "steep": activations(decay=2.0),
    "fewer-tokens-than-inputs": activations(tokens=40),
    "one-token": activations(tokens=1),
}
by_inputs = pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
by_solver = pytest.mark.parametrize("solver", solvers.INVERSES)


def tuned(rank: int = RANK) -> LowRank:
    return LowRank(*random_factors(D_OUT, D_IN, rank, seed=5), 2.0)


def wanted(x: Tensor, *, noise: float = 0.1) -> Tensor:
    """Outputs of a decaying linear map, plus noise."""
    left, right = torch.linalg.qr(drawn(D_OUT, D_OUT, seed=3)).Q, drawn(D_OUT, D_IN, seed=4)
    y = x @ (left * 0.7 ** torch.arange(D_OUT) @ right).T
    return y + noise * y.std() * drawn(len(x), D_OUT, seed=6)


def weights_of(x: Tensor) -> Tensor:
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(7)) + 0.1
    return weights / weights.sum()


def exact(x: Tensor, y: Tensor, update: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """`(D, M, D_r)` in float64, as DESIGN section 6 writes them."""
    T = update.scale * update.B.double() @ update.A.double()
    weights = weights_of(x).double()
    M = x.double().T @ torch.diag(weights) @ x.double()
    ridge = RIDGE * M.diagonal().mean()
    M = M + ridge * torch.eye(D_IN)
    D = (y.double().T @ torch.diag(weights) @ x.double() + ridge * T) @ torch.linalg.inv(M)
    return D, M, oracles.truncate_on_inputs(D, M, update.rank)


def solve(solver: str, x: Tensor, targets: dict[str, Tensor], updates: dict[str, LowRank]) -> dict[str, Solved]:
    held = HeldTokens(solver)
    for part in torch.arange(len(x)).chunk(3):
        held.add(x[part], {name: y[part] for name, y in targets.items()}, weights_of(x)[part])
    return held.solve(updates, ridge=RIDGE, seed=0)


def distance(found: Solved, best: Tensor, M: Tensor) -> float:
    update = found.update
    return norm_on_inputs(update.scale * update.B.double() @ update.A.double() - best, M) / norm_on_inputs(best, M)


@by_solver
@by_inputs
def test_the_solution_is_the_dense_one_within_one_percent_and_says_how_exact_it_is(x: Tensor, solver: str) -> None:
    y = wanted(x)
    D, M, best = exact(x, y, tuned())
    found = solve(solver, x, {"m": y}, {"m": tuned()})["m"]
    error = distance(found, best, M)
    assert error < 0.01
    assert error < 2.0 * found.solver_error + 1e-4
    assert found.solver_error < 2.0 * TOLERANCE
    assert found.truncation_error == pytest.approx(
        norm_on_inputs(D - best, M) / norm_on_inputs(D, M), rel=0.3, abs=2e-3
    )


@by_solver
def test_modules_of_any_rank_share_one_input(solver: str) -> None:
    x = INPUTS["outlier-channels"]
    updates = {"a": tuned(1), "b": tuned(12), "c": tuned(90)}
    targets = {"a": wanted(x), "b": wanted(x, noise=1.0), "c": -wanted(x)}
    for name, found in solve(solver, x, targets, updates).items():
        _, M, best = exact(x, targets[name], updates[name])
        assert distance(found, best, M) < 0.01, name
        assert (found.update.rank, found.update.scale) == (updates[name].rank, 2.0)


@by_solver
def test_it_is_the_solution_of_the_full_second_moments(solver: str) -> None:
    x = INPUTS["outlier-channels"]
    y = wanted(x)
    sums = NormalEquations.zeros(D_IN, {"m": D_OUT}, torch.device("cpu"))
    sums.add(x, {"m": y}, weights_of(x))
    full = sums.solve({"m": tuned()}, ridge=RIDGE, seed=0)["m"].update
    _, M, _ = exact(x, y, tuned())
    assert distance(solve(solver, x, {"m": y}, {"m": tuned()})["m"], full.dense().double(), M) < 0.01


@by_solver
def test_teachers_that_agree_are_followed(solver: str) -> None:
    x = INPUTS["decaying"]
    found = solve(solver, x, {"m": x @ tuned().dense().T}, {"m": tuned()})["m"]
    assert gap(found.update.dense(), tuned().dense()) < 1e-3
    assert found.truncation_error < 1e-3


@by_solver
def test_nothing_wanted_of_nothing_gives_the_zero_update(solver: str) -> None:
    nothing = LowRank(torch.zeros(RANK, D_IN), torch.zeros(D_OUT, RANK), 2.0)
    x = INPUTS["decaying"]
    found = solve(solver, x, {"m": torch.zeros(len(x), D_OUT)}, {"m": nothing})["m"]
    assert not found.update.dense().any()
    assert (found.truncation_error, found.solver_error) == (0.0, 0.0)


@by_solver
def test_inputs_in_16_bits_are_kept_as_they_are(solver: str) -> None:
    x = INPUTS["outlier-channels"].bfloat16()
    y = wanted(x.float())
    held = HeldTokens(solver)
    held.add(x, {"m": y}, weights_of(x))
    assert held.inputs[0] is x and held.wanted["m"][0].dtype == torch.bfloat16
    _, M, best = exact(x.float(), y, tuned())
    assert distance(held.solve({"m": tuned()}, ridge=RIDGE, seed=0)["m"], best, M) < 0.01


@by_solver
def test_the_same_call_gives_the_same_bits(solver: str) -> None:
    x = INPUTS["decaying"]
    one, two = (solve(solver, x, {"m": wanted(x)}, {"m": tuned()})["m"].update for _ in range(2))
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


def test_too_few_rounds_are_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = INPUTS["decaying"]
    y = wanted(x, noise=3.0)
    monkeypatch.setattr(directions, "MOST_ROUNDS", 1)
    _, M, best = exact(x, y, tuned())
    found = solve("moment", x, {"m": y}, {"m": tuned()})["m"]
    assert distance(found, best, M) > 0.05 and found.solver_error > 0.05


def test_too_few_steps_are_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = INPUTS["decaying"]
    monkeypatch.setattr(solvers, "MOST_STEPS", 1)
    monkeypatch.setattr(solvers, "sketch_size", lambda d_in, rank: 4)
    assert solve("iterative", x, {"m": wanted(x)}, {"m": tuned()})["m"].solver_error > 0.01


# Conjugate gradients


@pytest.mark.parametrize("k", [1, 5, 30])
def test_conjugate_gradients_solve_a_positive_definite_system(k: int) -> None:
    root = drawn(30, 30, seed=1).double()
    A = root @ root.T + torch.eye(30)
    wanted = drawn(30, k, seed=2).double()
    expected = torch.linalg.solve(A, wanted)
    found, error = block_conjugate_gradients(lambda v: A @ v, wanted, 1e-8)
    assert norm_on_inputs((found - expected).T, A) < 1e-7 * norm_on_inputs(expected.T, A)
    assert error <= 1e-8


@pytest.mark.parametrize("precision", [0.03, 0.003, 0.0003])
def test_conjugate_gradients_are_at_least_as_exact_as_they_say(precision: float) -> None:
    A = torch.diag(torch.logspace(0, 2.5, 200).double())
    wanted = drawn(200, 3, seed=2).double()
    found, error = block_conjugate_gradients(lambda v: A @ v, wanted, precision)
    expected = wanted / A.diagonal()[:, None]
    assert norm_on_inputs((found - expected).T, A) / norm_on_inputs(expected.T, A) < 2.0 * error


def test_columns_that_depend_on_each_other_do_no_harm() -> None:
    A = torch.diag(torch.arange(1.0, 21.0))
    wanted = drawn(20, 2, seed=2).repeat(1, 3)
    found, _ = block_conjugate_gradients(lambda v: A @ v, wanted, 1e-4)
    assert gap(found, wanted / A.diagonal()[:, None]) < 1e-3


def test_products_are_those_of_the_weighted_rows() -> None:
    x, roots = INPUTS["decaying"], weights_of(INPUTS["decaying"]).sqrt()[:, None]
    X, dense = Weighted(x.split(150), roots), x * roots
    v, u = drawn(D_IN, 3, seed=1), drawn(len(x), 3, seed=2)
    assert gap(X.times(v), dense @ v) < 1e-5 and gap(X.adjoint(u), dense.T @ u) < 1e-5
    assert X.power() == pytest.approx(float((dense**2).sum()), rel=1e-5)


# Drawn tokens


def all_weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(4, 25, generator=generator) * (torch.rand(4, 25, generator=generator) < 0.8) for _ in "abc"]
    weights[1][0, :3] = 30.0
    return weights


def draws(most: int, count: int = 400) -> Iterator[Tensor]:
    for seed in range(count):
        yield torch.cat([w.flatten() for w in draw_tokens(all_weights(), most, seed)])


def test_the_drawn_tokens_are_as_many_as_asked_for_and_the_heavy_ones_are_all_kept() -> None:
    flat = torch.cat([w.flatten() for w in all_weights()])
    for found in draws(50, count=20):
        assert int((found > 0).sum()) == 50
        assert not found[flat == 0].any()
        assert torch.equal(found[flat == 30.0], flat[flat == 30.0])


def test_drawn_weights_are_right_on_average() -> None:
    flat = torch.cat([w.flatten() for w in all_weights()])
    mean = torch.stack(list(draws(50))).mean(dim=0)
    light = (flat > 0.05) & (flat < 30.0)
    assert float(mean.sum()) == pytest.approx(float(flat.sum()), rel=0.01)
    assert float(((mean - flat)[light] / flat[light]).abs().max()) < 0.5
    assert float(((mean - flat)[light] / flat[light]).mean().abs()) < 0.03


def test_few_tokens_are_all_kept_as_they_are() -> None:
    weights = all_weights()
    assert all(torch.equal(a, b) for a, b in zip(draw_tokens(weights, 300, 0), weights, strict=True))
