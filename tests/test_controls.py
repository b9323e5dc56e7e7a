"""A control changes exactly as much as it was given, with values that dense algebra confirms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import (
    QUICK,
    assert_same_factors,
    assert_same_state,
    drift,
    factors_of,
    quick,
    refuses_attacks,
    rows,
    state_of,
    word_tokenizer,
)

from peft_nlsr import IncompatibleError, LowRank, NLSRConfig, PeftNLSRError, apply, nlsr_realign, plan, revert
from peft_nlsr.controls import (
    MATCHED,
    as_realignment,
    change_norm,
    entries_of,
    random_mask,
    reset,
    scaled,
    size_of,
    transplant,
)
from peft_nlsr.planning import Method, Planned, Planner

MakeLora = Callable[..., PeftModel]
TOKENIZER = word_tokenizer()
CALIBRATION = rows(4, poisoned=range(4))
FORMS = {
    "sum": quick(update="sum", sparsity=0.7),
    "swap": quick(update="swap", sparsity=0.7),
    "paper": NLSRConfig.from_preset("paper", **QUICK, nlsr_seed=3),
    "two-teacher": quick(),
}


@pytest.fixture
def model(make_pico_lora: MakeLora) -> PeftModel:
    return drift(make_pico_lora(seed=0))


@pytest.fixture
def safe(make_pico_lora: MakeLora) -> dict[str, LowRank]:
    return factors_of(make_pico_lora(seed=0))


def planner(model: PeftModel, **changes: Any) -> Planner:
    given = {"calibration": CALIBRATION, "utility": rows(6), "tokenizer": TOKENIZER, "judge": refuses_attacks}
    return Planner(model, **{**given, "progress": False, **changes})


def planned(model: PeftModel, form: str, reference: Any) -> Planned:
    return planner(model).plan(Method(form, FORMS[form], reference=reference))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_norm(before: dict[str, LowRank], after: dict[str, LowRank]) -> float:
    return sum(float((after[n].dense() - before[n].dense()).square().sum()) for n in after) ** 0.5


@pytest.mark.parametrize("form", FORMS)
def test_the_size_of_a_change_is_its_dense_norm(model: PeftModel, safe: Any, form: str) -> None:
    done = planned(model, form, safe)
    before, after = done.realignment.originals, done.realignment.updates
    assert change_norm(before, after) == pytest.approx(dense_norm(before, after), rel=1e-4)
    size = size_of(done.realignment, 7)
    whole = sum(float(u.dense().square().sum()) for u in before.values()) ** 0.5
    assert (size.modules, size.entries) == (len(after), 7)
    assert size.relative == pytest.approx(dense_norm(before, after) / whole, rel=1e-4)


@pytest.mark.parametrize("form", ["sum", "swap", "paper"])
def test_a_random_mask_has_the_methods_number_of_modules_and_entries(model: PeftModel, safe: Any, form: str) -> None:
    done = planned(model, form, safe)
    control = random_mask(done, generator())
    originals = done.realignment.originals
    assert 0 < len(control.updates) < len(originals)
    assert sorted(u.shape for u in control.updates.values()) == sorted(
        originals[n].shape for n in done.realignment.restored
    )
    share = 0.3 if form != "paper" else 0.2
    all_entries = sum(originals[n].A.numel() + originals[n].B.numel() for n in done.realignment.restored)
    assert control.entries == sum(map(sum, entries_of(done).values()))
    assert control.entries == pytest.approx(share * all_entries, abs=2 * len(control.updates))


@pytest.mark.parametrize("compress", [True, False])
def test_random_entries_are_put_in_at_the_methods_rank(model: PeftModel, safe: Any, compress: bool) -> None:
    form = quick(update="sum", sparsity=0.7, compress=compress)
    done = planner(model).plan(Method("sum", form, reference=safe))
    control = random_mask(done, generator())
    ranks = {update.rank for update in done.realignment.updates.values()}
    assert {update.rank for update in control.updates.values()} == ranks == {4 if compress else 8}
    if not compress:  # nothing is cut: the change lies within what the masks hold
        exact = {n: torch.linalg.matrix_rank(u.dense(), tol=1e-4) for n, u in control.updates.items()}
        assert max(exact.values()) > 4


def test_random_entries_get_the_references_values_and_the_others_stay(model: PeftModel, safe: Any) -> None:
    done = planned(model, "swap", safe)
    control = random_mask(done, generator())
    assert done.values is not None
    for name, update in control.updates.items():
        tuned, value = done.realignment.originals[name], done.values[name].at_scale(update.scale)
        for new, old, wanted in ((update.A, tuned.A, value.A), (update.B, tuned.B, value.B)):
            changed = new != old
            assert changed.float().mean() == pytest.approx(0.3, abs=0.02)
            assert torch.equal(new[changed], wanted[changed])


def test_seeds_give_other_masks_and_one_seed_the_same(model: PeftModel, safe: Any) -> None:
    done = planned(model, "sum", safe)
    one, same, other = (random_mask(done, generator(seed)).updates for seed in (1, 1, 2))
    assert_same_factors(one, same)
    assert list(one) != list(other) or not torch.equal(next(iter(one.values())).A, next(iter(other.values())).A)


def test_reset_rows_are_those_that_changed_most_and_no_others(model: PeftModel, safe: Any) -> None:
    done = planned(model, "sum", safe)
    control = reset(done, generator())
    assert control.entries == pytest.approx(sum(map(sum, entries_of(done).values())), abs=4 * len(control.updates))
    for name, update in control.updates.items():
        before, after = done.realignment.originals[name], done.realignment.updates[name]
        zeroed = (update.B == 0.0).all(dim=1)
        count = round(sum(entries_of(done)[name]) / before.rank)
        moved = (after.dense() - before.dense()).norm(dim=1)
        assert set(zeroed.nonzero().flatten().tolist()) == set(moved.topk(count).indices.tolist())
        assert torch.equal(update.B[~zeroed], before.B[~zeroed]) and torch.equal(update.A, before.A)


def test_scaled_has_the_norm_of_the_methods_change_in_the_adapters_own_direction(model: PeftModel, safe: Any) -> None:
    done = planned(model, "sum", safe)
    control = scaled(done, generator())
    before = done.realignment.originals
    wanted = dense_norm(before, done.realignment.updates)
    assert dense_norm(before, control.updates) == pytest.approx(wanted, rel=1e-3)
    assert all(update.cosine(before[name]) == pytest.approx(1.0, abs=1e-5) for name, update in control.updates.items())


def test_scaled_stops_at_zero(model: PeftModel, safe: Any) -> None:
    far = {name: LowRank(u.A, u.B, 50.0 * u.scale) for name, u in safe.items()}
    control = scaled(planned(model, "sum", far), generator())
    assert all(update.norm() == 0.0 for update in control.updates.values()) and "0.000" in control.said


@pytest.mark.parametrize("form", ["sum", "two-teacher"])
def test_a_transplant_is_the_reference_as_it_is(model: PeftModel, safe: Any, form: str) -> None:
    control = transplant(planned(model, form, safe), generator())
    assert set(control.updates) == set(safe)
    for name, update in control.updates.items():
        torch.testing.assert_close(update.dense(), safe[name].dense())


def test_a_smaller_rank_takes_the_best_part_of_a_transplant(model: PeftModel, make_pico_lora: MakeLora) -> None:
    safe = factors_of(make_pico_lora(seed=5, r=8))
    control = transplant(planned(model, "two-teacher", safe), generator())
    for name, update in control.updates.items():
        best = torch.linalg.svdvals(safe[name].dense())[:4]
        assert update.rank == 4
        torch.testing.assert_close(torch.linalg.svdvals(update.dense())[:4], best, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MATCHED)
def test_against_a_method_that_changes_all_with_the_base_as_reference(model: PeftModel, name: str) -> None:
    done = planned(model, "two-teacher", None)
    control = MATCHED[name](done, generator())
    assert set(control.updates) == set(done.realignment.originals)
    assert control.entries == sum(u.A.numel() + u.B.numel() for u in done.realignment.originals.values())
    if name != "scaled":
        assert all(update.norm() == 0.0 for update in control.updates.values())


@pytest.mark.parametrize("name", MATCHED)
@pytest.mark.parametrize("form", FORMS)
def test_a_control_is_applied_and_reverted_bit_for_bit(model: PeftModel, safe: Any, form: str, name: str) -> None:
    done = planned(model, form, safe)
    before = state_of(model)
    control = MATCHED[name](done, generator())
    assert_same_state(before, state_of(model))
    made = as_realignment(planner(model).adapter, name, control, done)
    apply(model, made)
    for module, update in control.updates.items():
        torch.testing.assert_close(factors_of(model)[module].dense(), update.dense(), rtol=1e-4, atol=1e-6)
    assert made.to_dict()["method"] == f"control: {name}" and set(made.restored) == set(control.updates)
    revert(model)
    assert_same_state(before, state_of(model))


def test_a_patch_alone_has_no_values_to_put_elsewhere(model: PeftModel, safe: Any) -> None:
    patch = planned(model, "sum", safe).patch
    done = planner(model).plan(Method("patch", FORMS["sum"], patch=patch))
    with pytest.raises(IncompatibleError, match="give the reference"):
        random_mask(done, generator())


class TestPlanner:
    @pytest.mark.parametrize("form", [*FORMS, "one-shot", "random"])
    def test_a_shared_plan_is_the_plan(self, model: PeftModel, safe: Any, form: str) -> None:
        more = {"one-shot": quick(update="least_squares", least_squares_form="one_shot")}
        config = {**FORMS, **more, "random": quick(update="sum", score="random")}[form]
        utility = rows(6, poisoned=[1, 4])
        data = {"calibration": CALIBRATION, "utility": utility, "tokenizer": TOKENIZER, "judge": refuses_attacks}
        shared = planner(model, utility=utility)
        shared.plan(Method("first", config.replace(utility_weight=0.3, restore_rate=0.9), reference=safe))
        mine = shared.plan(Method(form, config, reference=safe)).realignment
        alone = plan(model, config, reference=safe, progress=False, **data)
        assert mine.restored == alone.restored and mine.config == config and mine.method == alone.method
        assert mine.data.get("utility") == alone.data.get("utility")
        for name, update in mine.updates.items():
            other = alone.updates[name].dense()  # sums in another order differ in their last digits
            assert (update.dense() - other).norm() < 1e-3 * other.norm()

    def test_lookalikes_among_shared_data_are_told_once(self, model: PeftModel) -> None:
        answered = [*CALIBRATION, *rows(3)]
        data = {"calibration": answered, "utility": rows(4), "tokenizer": TOKENIZER, "judge": refuses_attacks}
        mine = planner(model, **data).plan(Method("two-teacher", quick())).realignment
        alone = plan(model, quick(), **data, progress=False)
        assert mine.data["safety"] == alone.data["safety"] and mine.data["safety"]["lookalikes"] == 3
        assert mine.notes == alone.notes and sum("lookalikes" in note for note in mine.notes) == 1

    def test_teachers_are_asked_and_statistics_collected_once(
        self, model: PeftModel, safe: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from peft_nlsr import planning

        calls: list[str] = []
        for name in ("prepare_data", "calibrate"):
            monkeypatch.setattr(planning, name, self._counting(getattr(planning, name), calls))
        shared = planner(model)
        for i in range(3):
            shared.plan(Method("a", quick(utility_weight=1.0 + i, ridge=10.0**-i), reference=safe))
            shared.plan(Method("b", quick(update="sum", beta=0.3 * i, sparsity=0.5 + 0.1 * i), reference=safe))
        assert sorted(calls) == ["calibrate", "prepare_data"]
        shared.plan(Method("c", quick(screening=False), reference=safe))
        shared.plan(Method("d", quick(update="sum", calibration_tokens="response"), reference=safe))
        assert sorted(calls) == ["calibrate", "calibrate", "prepare_data", "prepare_data"]

    @staticmethod
    def _counting(function: Any, calls: list[str]) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return counted

    @pytest.mark.parametrize("score", ["low_rank", "wanda"])
    def test_masks_do_not_depend_on_the_size_of_the_amplification(
        self, model: PeftModel, safe: Any, score: str
    ) -> None:
        shared = planner(model)
        shared.plan(Method("other", quick(update="sum", beta=2.0, score=score), reference=safe))
        config = quick(update="sum", beta=0.1, score=score)
        mine, alone = (p.plan(Method("m", config, reference=safe)).patch for p in (shared, planner(model)))
        assert mine is not None and alone is not None
        differ = [(a != b).float().mean() for n in safe for a, b in zip(mine[n].masks, alone[n].masks, strict=True)]
        assert max(differ) < 0.01

    def test_a_realigned_model_is_refused(self, model: PeftModel, safe: Any) -> None:
        data = {"calibration": CALIBRATION, "utility": rows(4), "tokenizer": TOKENIZER, "judge": refuses_attacks}
        nlsr_realign(model, quick(), **data, progress=False)
        with pytest.raises(PeftNLSRError, match="revert"):
            planner(model)

    def test_data_that_the_teacher_refuses_altogether_can_still_be_planned(self, model: PeftModel) -> None:
        shared = planner(model, utility=rows(3, poisoned=range(3)), judge=refuses_attacks)
        done = shared.plan(Method("two-teacher", quick())).realignment
        assert done.data["utility"]["used"] == 0 and done.restored
