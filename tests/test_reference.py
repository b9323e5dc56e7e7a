"""References are exact on dW, keep the strong adapter's factors where they can, and only go with what fits them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from oracles import gap, random_factors
from peft import PeftModel
from torch import Tensor

from peft_nlsr.config import NLSRConfig
from peft_nlsr.errors import IncompatibleError
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.lowrank import LowRank
from peft_nlsr.reference import (
    BASE_REFERENCE,
    Lineage,
    Reference,
    align_gauge,
    extrapolate,
    factor_cosine,
    read_reference,
    reference_for_masks,
    starting_point,
)

MakeLora = Callable[..., PeftModel]
D_OUT, D_IN = 10, 14
SINGLE = 1e-5  # the factors are float32


def update(rank: int = 4, scale: float = 2.0, *, seed: int = 0) -> LowRank:
    return LowRank(*random_factors(D_OUT, D_IN, rank, seed=seed), scale)


def dense(u: LowRank) -> Tensor:
    return u.scale * u.B.double() @ u.A.double()


def gauged(u: LowRank, R: Tensor) -> LowRank:
    """The same update with other factors."""
    return LowRank((R @ u.A.double()).float(), (u.B.double() @ torch.linalg.inv(R)).float(), u.scale)


def turn(rank: int = 4, *, seed: int = 9) -> Tensor:
    return torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)).double()


# Extrapolation

PAIRS = {
    "same-rank": (update(), update(seed=1)),
    "lower-rank-weak": (update(), update(2, 0.5, seed=1)),
    "higher-rank-weak": (update(), update(9, 0.5, seed=1)),
    "other-scales": (update(scale=0.25), update(scale=16.0, seed=1)),
    "negative-scale": (update(scale=-2.0), update(seed=1)),
    "weak-is-a-part-of-the-strong": (update(), LowRank(update().A[:2], update().B[:, :2], 2.0)),
}


@pytest.mark.parametrize("beta", [0.0, 0.9, 3.0])
@pytest.mark.parametrize(("strong", "weak"), PAIRS.values(), ids=PAIRS)
def test_extrapolation_is_equation_2_on_dw_cut_to_the_strong_rank(strong: LowRank, weak: LowRank, beta: float) -> None:
    found, errors = extrapolate({"m": strong}, {"m": weak}, beta=beta)
    exact = oracles.extrapolate_dense(*raw(strong), *raw(weak), beta)
    best = oracles.truncate(exact, strong.rank)
    assert gap(dense(found["m"]), best) < SINGLE
    assert (found["m"].rank, found["m"].scale) == (strong.rank, strong.scale)
    assert errors["m"] == pytest.approx(gap(best, exact), abs=SINGLE)


def raw(u: LowRank) -> tuple[Tensor, Tensor, float]:
    return u.A, u.B, u.scale


@pytest.mark.parametrize("weak", [None, {}], ids=["no-weak-adapter", "a-module-the-weak-one-lacks"])
def test_without_a_weak_update_extrapolation_is_exact_and_balanced(weak: Any) -> None:
    strong = update()
    found, errors = extrapolate({"m": strong}, weak, beta=0.9)
    assert gap(dense(found["m"]), oracles.extrapolate_dense(*raw(strong), None, None, None, 0.9)) < SINGLE
    assert gap(found["m"].A, 1.9**0.5 * strong.A) < 1e-6 and gap(found["m"].B, 1.9**0.5 * strong.B) < 1e-6
    assert errors == {"m": 0.0}


def test_beta_zero_without_a_weak_adapter_is_the_strong_adapter_bit_for_bit() -> None:
    found, _ = extrapolate({"m": update()}, beta=0.0)
    assert torch.equal(found["m"].A, update().A) and torch.equal(found["m"].B, update().B)


def test_beta_zero_with_a_weak_adapter_has_the_factors_of_the_strong_one() -> None:
    found, _ = extrapolate({"m": update()}, {"m": update(seed=1)}, beta=0.0)
    assert gap(found["m"].A, update().A) < SINGLE and gap(found["m"].B, update().B) < SINGLE


@pytest.mark.parametrize("weak", [None, {"m": update(seed=1)}], ids=["no-weak-adapter", "a-weak-adapter"])
def test_the_released_form_doubles_beta_on_both_factors_and_ignores_the_weak_adapter(weak: Any) -> None:
    found, errors = extrapolate({"m": update()}, weak, beta=0.9, form="released")
    A, B = oracles.released_amplify(update().A, update().B, 0.9)
    assert gap(found["m"].A, A) < 1e-6 and gap(found["m"].B, B) < 1e-6
    assert gap(dense(found["m"]), 3.24 * dense(update())) < SINGLE
    assert (found["m"].scale, errors["m"]) == (2.0, 0.0)


def test_modules_keep_their_own_updates_and_order() -> None:
    strong = {name: update(seed=i) for i, name in enumerate("cab")}
    found, _ = extrapolate(strong, {"a": update(seed=7)}, beta=0.5)
    assert list(found) == list(strong)
    assert gap(dense(found["b"]), 1.5 * dense(strong["b"])) < SINGLE


def test_a_weak_module_without_a_strong_one_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"1 modules that the strong one lacks, first n"):
        extrapolate({"m": update()}, {"m": update(), "n": update()})


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.1], ids=["scale-1", "scale-2", "scale-0.1"])
def test_a_weak_adapter_leaves_the_factors_near_the_strong_ones(scale: float) -> None:
    strong, weak = update(scale=scale), update(scale=0.05 * scale, seed=1)
    found, _ = extrapolate({"m": strong}, {"m": weak}, beta=0.9)
    assert gap(found["m"].A, strong.A) < 0.1
    assert gap(found["m"].B, 1.9 * strong.B) < 0.1
    assert Lineage.of({"m": strong}, found).similarity > 0.99


# The gauge


def test_alignment_undoes_a_change_of_gauge() -> None:
    aligned = align_gauge(gauged(update(), turn()), update())
    assert gap(aligned.A, update().A) < SINGLE and gap(aligned.B, update().B) < SINGLE


@pytest.mark.parametrize("seed", [1, 2])
def test_alignment_keeps_dw_and_its_a_is_the_closest_there_is(seed: int) -> None:
    u, goal = update(seed=seed), update(seed=5)
    aligned = align_gauge(u, goal)
    assert gap(dense(aligned), dense(u)) < SINGLE
    left_over = (goal.A - aligned.A).double()
    assert float((left_over @ u.A.double().T).abs().max()) < 1e-4 * float(goal.A.norm())
    assert gap(aligned.A, goal.A) <= gap(u.A, goal.A)


def test_a_deficient_update_keeps_its_factors() -> None:
    deficient = LowRank(torch.cat([update().A[:3], torch.zeros(1, D_IN)]), update().B, 2.0)
    aligned = align_gauge(deficient, update(seed=1))
    assert torch.equal(aligned.A, deficient.A) and torch.equal(aligned.B, deficient.B)


# Lineage


def test_factors_are_similar_to_what_they_were_trained_from_and_to_nothing_else() -> None:
    strong = {name: update(seed=i) for i, name in enumerate("abc")}
    trained = {n: LowRank(u.A + 0.1 * update(seed=8).A, u.B, u.scale) for n, u in strong.items()}
    fresh = {name: update(seed=20 + i) for i, name in enumerate("abc")}
    turned = {name: gauged(u, turn()) for name, u in strong.items()}
    assert Lineage.of(strong, strong).similarity == pytest.approx(1.0)
    assert Lineage.of(trained, strong).similarity > 0.98
    assert abs(Lineage.of(fresh, strong).similarity) < 0.3
    assert Lineage.of(turned, strong).similarity < 0.5


def test_factors_of_another_rank_are_not_similar() -> None:
    assert Lineage.of({"m": update()}, {"m": update(5)}).similarity == 0.0


def test_factors_are_compared_where_the_reference_has_entries() -> None:
    strong, other = update(), update(seed=1)
    mask = strong.A > 0.05
    kept = LowRank(torch.where(mask, strong.A, 0.0), strong.B, strong.scale)
    mixed = LowRank(torch.where(mask, strong.A, other.A), other.B, other.scale)
    assert factor_cosine(mixed, kept) == pytest.approx(1.0)
    assert factor_cosine(mixed, strong) < 0.95
    assert factor_cosine(strong, LowRank(torch.zeros_like(strong.A), strong.B, strong.scale)) is None


def test_modules_without_entries_have_no_part_in_the_median() -> None:
    strong, empty = update(), LowRank(torch.zeros_like(update().A), update().B, 1.0)
    assert Lineage.of({"a": strong, "b": strong, "c": strong}, {"a": empty, "b": empty, "c": strong}).similarity > 0.99
    assert Lineage.of({"a": strong}, {"a": empty}).similarity == 0.0


# Where a reference comes from


def adapter(make_pico_lora: MakeLora, **settings: Any) -> LiveAdapter:
    return LiveAdapter(make_pico_lora(**settings))


def test_no_reference_is_the_base_model(make_pico_lora: MakeLora) -> None:
    assert read_reference(None, adapter(make_pico_lora)) is BASE_REFERENCE
    assert BASE_REFERENCE.updates is None


@pytest.mark.parametrize("kind", ["mapping", "folder", "model", "reference"])
def test_a_reference_is_read_from_what_people_have(make_pico_lora: MakeLora, tmp_path: Path, kind: str) -> None:
    safe = make_pico_lora(seed=1)
    safe.save_pretrained(tmp_path)
    expected = LiveAdapter(safe).snapshot()
    source = {
        "mapping": expected,
        "folder": str(tmp_path),
        "model": safe,
        "reference": Reference("adapter", expected, "mine"),
    }[kind]
    updates = read_reference(source, adapter(make_pico_lora)).updates
    assert updates is not None
    for name, safe_update in expected.items():
        assert torch.equal(updates[name].A, safe_update.A) and torch.equal(updates[name].B, safe_update.B)


def test_a_reference_of_another_rank_is_read(make_pico_lora: MakeLora) -> None:
    other = adapter(make_pico_lora, r=6).snapshot()
    assert read_reference(other, adapter(make_pico_lora)).updates is other


def wrong_shape(updates: dict[str, LowRank]) -> dict[str, LowRank]:
    return updates | {"model.layers.0.self_attn.q_proj": LowRank(torch.zeros(4, 7), torch.zeros(32, 4))}


def one_less(updates: dict[str, LowRank]) -> dict[str, LowRank]:
    return {name: u for name, u in updates.items() if name != "model.layers.1.self_attn.v_proj"}


MISFITS: dict[str, tuple[Callable[[dict[str, LowRank]], Any], str]] = {
    "lacks-a-module": (one_less, r"1 differ, first model.layers.1.self_attn.v_proj, which the reference lacks"),
    "has-one-more": (lambda u: u | {"x": update()}, "first x, which the adapter lacks"),
    "other-shape": (wrong_shape, r"q_proj has shape \(32, 7\), the adapter's \(32, 32\)"),
}


@pytest.mark.parametrize(("spoil", "words"), MISFITS.values(), ids=MISFITS)
def test_a_reference_that_does_not_fit_names_the_module(
    make_pico_lora: MakeLora, spoil: Callable[[dict[str, LowRank]], Any], words: str
) -> None:
    tuned = adapter(make_pico_lora)
    with pytest.raises(IncompatibleError, match=words):
        read_reference(spoil(tuned.snapshot()), tuned)


def test_a_reference_for_another_base_is_refused(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora()
    model.peft_config["default"].base_model_name_or_path = "org/one"
    tuned = LiveAdapter(model)
    other = Reference("adapter", tuned.snapshot(), "theirs", "org/two")
    with pytest.raises(IncompatibleError, match="org/two, the adapter on org/one"):
        read_reference(other, tuned)


def test_the_starting_point_does_not_follow_the_adapter(make_pico_lora: MakeLora) -> None:
    tuned = adapter(make_pico_lora)
    before = tuned.snapshot()
    start = starting_point(tuned)
    tuned.write({name: update.times(2.0) for name, update in before.items()})
    assert start.kind == "starting_point" and start.updates is not None
    for name, expected in before.items():
        assert torch.equal(start.updates[name].B, expected.B)


def test_an_adapter_that_has_not_learned_yet_starts_from_the_base_model(make_pico_lora: MakeLora) -> None:
    fresh = adapter(make_pico_lora)
    fresh.write({name: LowRank(u.A, torch.zeros_like(u.B), u.scale) for name, u in fresh.items()})
    assert starting_point(fresh) is BASE_REFERENCE


# The reference that masks are cut from


@pytest.mark.parametrize("form", ["exact", "released"])
def test_masks_are_cut_from_the_amplified_reference(form: str) -> None:
    config = NLSRConfig(beta=0.7, extrapolation=form)
    given = Reference("adapter", {"m": update()}, "an aligned adapter", "org/base")
    found = reference_for_masks(given, {"m": update(3, seed=1)}, config)
    expected, _ = extrapolate({"m": update()}, {"m": update(3, seed=1)}, beta=0.7, form=form)
    assert found.updates is not None
    assert gap(dense(found.updates["m"]), dense(expected["m"])) == 0.0
    assert (found.kind, found.base_model) == ("extrapolated", "org/base")
    assert all(words in found.description for words in ("an aligned adapter", "0.7", form))
    assert ("truncation error" in found.description) == (form == "exact")


def test_the_base_model_has_no_entries_to_mask() -> None:
    with pytest.raises(IncompatibleError, match="least_squares"):
        reference_for_masks(BASE_REFERENCE, None, NLSRConfig())
