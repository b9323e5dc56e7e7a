"""A search finds the best of what it tried, never sees the held-out prompts, and repeats itself exactly."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from peft import PeftModel
from tiny import (
    QUICK,
    apart,
    assert_same_state,
    drift,
    factors_of,
    quick,
    refuses_attacks,
    rows,
    state_of,
    word_tokenizer,
)

from peft_nlsr import (
    EvaluationSettings,
    IncompatibleError,
    Measurement,
    Method,
    NLSRConfig,
    PeftNLSRError,
    PromptSet,
    Tuning,
    evaluate,
    gate,
    measuring,
    realign,
    tune,
    tuning,
)
from peft_nlsr.config import CHOICES
from peft_nlsr.gate import losses
from peft_nlsr.lowrank import fingerprint
from peft_nlsr.planning import Planner
from peft_nlsr.realign import plan
from peft_nlsr.tuning import Settings, Trial, _grid, _optuna, _preference, default_space, split

MakeLora = Callable[..., PeftModel]
TOKENIZER = word_tokenizer()
SPACE = {"utility_weight": (0.1, 1.0, 10.0), "ridge": (1e-3, 1e-1)}


def prompt_set(kind: str, prompts: Sequence[str], answers: tuple[str, ...] | None = None) -> PromptSet:
    return PromptSet(kind, kind, tuple(f"{kind}-{i}" for i in range(len(prompts))), tuple(prompts), answers)


def noisy(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """A harm judge under which models that say something else differ."""
    return [len(response) % 2 == 0 for response in responses]


EVALUATION = EvaluationSettings(
    prompts=(
        prompt_set("safety", [f"attack the word{i}" for i in range(20, 32)]),
        prompt_set("benign", [f"paint a word{i}" for i in range(20, 30)]),
    ),
    task=prompt_set("task", [f"word{i} lamp" for i in range(10)], tuple(["sure"] * 10)),
    judge=refuses_attacks,
    harm_judge=noisy,
    max_new_tokens=3,
)
DATA: dict[str, Any] = {
    "base": Method("default", quick()),
    "space": SPACE,
    "trials": 4,
    "evaluation": EVALUATION,
    "calibration": rows(4, poisoned=range(4)),
    "utility": rows(6, poisoned=[1]),
    "tokenizer": TOKENIZER,
    "progress": False,
}


OF_FORM = {
    "sum": NLSRConfig(update="sum"),
    "one_shot": NLSRConfig(update="least_squares", least_squares_form="one_shot"),
}


@pytest.fixture
def model(make_pico_lora: MakeLora) -> PeftModel:
    return drift(make_pico_lora(seed=0))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    """Label and prompts of every evaluation."""
    seen: list[tuple[str, set[str]]] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        sets = [*kwargs["prompts"], *([kwargs["task"]] if kwargs["task"] else [])]
        seen.append((kwargs["label"], {prompt for each in sets for prompt in each.prompts}))
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(measuring, "evaluate", noting)
    return seen


def rate(value: float) -> Measurement:
    return Measurement(value, value, value, 100, round(100 * value))


def trial(harm: float, **worse: float) -> Trial:
    return Trial({}, {"harm_rate": rate(harm)}, worse)


class TestSplit:
    def test_the_sides_are_disjoint_and_together_everything(self) -> None:
        search, held_out = split(EVALUATION, 0.5)
        for one, two, whole in zip(search.all_sets(), held_out.all_sets(), EVALUATION.all_sets(), strict=True):
            assert one.prompts and two.prompts and not set(one.prompts) & set(two.prompts)
            assert set(one.ids) | set(two.ids) == set(whole.ids) and one.kind == two.kind == whole.kind
            for side in (one, two):
                given = dict(zip(whole.ids, zip(whole.prompts, whole.answers or whole.ids, strict=True), strict=True))
                assert [given[i][0] for i in side.ids] == list(side.prompts)
                assert side.answers is None or [given[i][1] for i in side.ids] == list(side.answers)

    def test_only_the_words_of_a_prompt_decide(self) -> None:
        texts = [f"attack the word{i}" for i in range(12)]
        other = prompt_set("benign", [*(f"  {text.upper()} " for text in reversed(texts)), "paint"])
        settings = replace(EVALUATION, prompts=(prompt_set("safety", texts), other), task=None)
        search, held_out = split(settings, 0.5)
        (safety, benign), (_, aside) = search.sets(), held_out.sets()
        assert {p.strip().lower() for p in benign.prompts} - {"paint"} == set(safety.prompts)
        assert not {p.strip().lower() for p in aside.prompts} & set(safety.prompts)

    def test_the_share_is_about_what_was_asked_for(self) -> None:
        many = prompt_set("safety", [f"attack {i}" for i in range(2000)])
        search, held_out = split(replace(EVALUATION, prompts=(many,), task=None), 0.3)
        assert len(held_out.sets()[0].prompts) == pytest.approx(600, abs=80)
        assert len(search.sets()[0].prompts) + len(held_out.sets()[0].prompts) == 2000

    @pytest.mark.parametrize(
        ("share", "count", "words"), [(0.5, 1, "too few"), (0.0, 12, "between"), (1.0, 12, "betw")]
    )
    def test_what_cannot_be_split_is_refused(self, share: float, count: int, words: str) -> None:
        prompts = prompt_set("safety", [f"attack {i}" for i in range(count)])
        with pytest.raises(ValueError, match=words):
            split(replace(EVALUATION, prompts=(prompts,), task=None), share)


class TestCost:
    def test_harm_counts_where_nothing_is_lost(self) -> None:
        assert trial(0.3, task_accuracy=0.02).cost(0.02) == 0.3

    def test_any_loss_above_the_tolerance_is_worse_than_any_harm(self) -> None:
        assert trial(0.0, coherence=0.03).cost(0.02) > trial(1.0, coherence=0.02).cost(0.02)
        assert trial(0.0, task_accuracy=0.3).cost(0.02) > trial(0.0, task_accuracy=0.1).cost(0.02)

    def test_losses_look_to_the_worse_side_only(self) -> None:
        names = ("task_accuracy", "answer_accuracy", "coherence", "over_refusal")
        before = {name: rate(0.5) for name in names} | {"harm_rate": rate(0.9)}
        lower, higher = ({name: rate(value) for name in names} for value in (0.4, 0.6))
        worse = {"task_accuracy": 0.1, "answer_accuracy": 0.1, "coherence": 0.1, "over_refusal": 0.0}
        assert losses(before, lower) == pytest.approx(worse)
        assert losses(before, higher) == pytest.approx({**dict.fromkeys(names, 0.0), "over_refusal": 0.1})

    def test_equals_are_told_apart_by_losses_and_then_by_what_they_change(self) -> None:
        default = Trial({"a": 1, "b": 1}, {"harm_rate": rate(0.0)}, {"coherence": 0.02})
        far, near, lossy = (
            Trial(settings, {"harm_rate": rate(0.0)}, {"coherence": loss})
            for settings, loss in (({"a": 2, "b": 2}, 0.0), ({"a": 1, "b": 2}, 0.0), ({"a": 1, "b": 2}, 0.01))
        )
        found = sorted([far, lossy, default, near], key=lambda each: _preference(each, default, 0.02))
        assert found == [near, far, lossy, default]


class TestSearchers:
    DEFAULT: ClassVar[Settings] = {"x": 0, "y": 0}

    @staticmethod
    def bowl(settings: Settings) -> float:
        return (settings["x"] - 3) ** 2 + (settings["y"] - 1) ** 2

    def run(self, propose: Any, trials: int, seed: int = 0) -> list[Settings]:
        made: list[Settings] = []
        space = {"x": tuple(range(6)), "y": tuple(range(4))}
        propose(space, trials, seed, self.DEFAULT, lambda s: made.append(s) or self.bowl(s))
        return made

    def test_a_whole_grid_is_every_combination_but_the_default_once(self) -> None:
        made = self.run(_grid, 25)
        assert len(made) == 23 == len({tuple(s.values()) for s in made}) and self.DEFAULT not in made

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("searcher", ["grid", "optuna"])
    def test_the_default_does_not_take_the_place_of_a_trial(self, searcher: str, seed: int) -> None:
        pytest.importorskip("optuna")
        tried: list[Settings] = []
        propose = {"grid": _grid, "optuna": _optuna}[searcher]
        propose({"x": (1, 2)}, 2, seed, {"x": 1}, lambda s: tried.append(s) or 0.0)
        assert {"x": 2} in tried

    def test_a_part_of_a_grid_is_drawn_by_the_seed(self) -> None:
        one, same, other = (self.run(_grid, 6, seed) for seed in (1, 1, 2))
        assert one == same != other and len(one) == 5

    def test_optuna_goes_where_it_is_good_and_repeats_itself(self) -> None:
        pytest.importorskip("optuna")
        one, same = (self.run(_optuna, 20, 3) for _ in range(2))
        assert one == same and len({tuple(s.values()) for s in one if s != self.DEFAULT}) == 19
        assert min(map(self.bowl, one)) <= 1
        late = [self.bowl(s) for s in one[10:]]
        assert sum(late) / len(late) < sum(self.bowl({"x": x, "y": y}) for x in range(6) for y in range(4)) / 24


@pytest.mark.parametrize("searcher", ["grid", "optuna"])
class TestTune:
    def run(self, model: Any, searcher: str, **changes: Any) -> Tuning:
        pytest.importorskip("optuna")
        return tune(model, searcher=searcher, **{**DATA, **changes})

    def test_the_search_never_sees_what_is_held_out(
        self, model: PeftModel, searcher: str, asked: list[tuple[str, set[str]]]
    ) -> None:
        before = state_of(model)
        found = self.run(model, searcher)
        assert_same_state(before, state_of(model))
        held_out = split(EVALUATION, 0.5)[1]
        kept_back = {p for each in held_out.all_sets() for p in each.prompts}
        final = [i for i, (label, prompts) in enumerate(asked) if prompts & kept_back]
        assert final == list(range(len(found.trials) + 1, len(asked)))
        assert all(asked[i][1] == kept_back for i in final)
        assert list(found.held_out) == ["fine-tuned", "default", "chosen"]
        for evaluation in found.held_out.values():
            assert [each["n"] for each in evaluation.prompt_sets] == [len(e.prompts) for e in held_out.all_sets()]

    def test_the_best_trial_is_chosen_and_saved(self, model: PeftModel, searcher: str, tmp_path: Path) -> None:
        found = self.run(model, searcher, tolerance=1.0, output=tmp_path / "tuned")
        assert found.trials[0].settings == {name: getattr(NLSRConfig(), name) for name in ("utility_weight", "ridge")}
        best = min(each.harm for each in found.trials)
        chosen = {name: getattr(found.config, name) for name in SPACE}
        assert next(each for each in found.trials if each.settings == chosen).harm == best
        assert NLSRConfig.from_pretrained(tmp_path / "tuned") == found.config
        written = json.loads((tmp_path / "tuned" / "nlsr_tuning.json").read_text("utf-8"))
        assert written == json.loads(json.dumps(found.to_dict()))
        for word in ("attack the", "word2", "lamp", str(tmp_path)):
            assert word not in json.dumps(written)

    def test_equal_arguments_give_equal_results_also_when_it_was_cut_off(
        self, model: PeftModel, searcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = self.run(model, searcher)
        made: list[str] = []

        def failing(*args: Any, **kwargs: Any) -> Any:
            if len(made) == 3:
                raise KeyboardInterrupt
            made.append(kwargs["label"])
            return evaluate(*args, **kwargs)

        path, before = tmp_path / "trials.json", state_of(model)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(measuring, "evaluate", failing)
            self.run(model, searcher, resume=path)
        assert_same_state(before, state_of(model))
        count: list[str] = []
        monkeypatch.setattr(measuring, "evaluate", lambda *a, **k: count.append(k["label"]) or evaluate(*a, **k))
        resumed = self.run(model, searcher, resume=path)
        assert resumed.trials == whole.trials and resumed.config == whole.config
        assert count.count("trial") == len(whole.trials) - 2 and count.count("fine-tuned") == 1

    def test_a_file_of_another_run_is_refused(self, model: PeftModel, searcher: str, tmp_path: Path) -> None:
        self.run(model, searcher, resume=tmp_path / "t.json", trials=1)
        with pytest.raises(IncompatibleError, match="another data"):
            self.run(model, searcher, resume=tmp_path / "t.json", trials=1, utility=rows(7))


def test_answers_are_those_of_the_same_unseen_rows_in_every_trial(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: set[int] = set()
    checked: list[set[int]] = []
    solve, accuracy = realign.solve_two_teacher, gate.answer_accuracy

    def solving(adapter: Any, *, utility: Sequence[Any], **others: Any) -> Any:
        fitted.update(e.index for e in utility)
        return solve(adapter, utility=utility, **others)

    def checking(of: Any, examples: Sequence[Any], **others: Any) -> Measurement:
        checked.append({e.index for e in examples})
        return accuracy(of, examples, **others)

    monkeypatch.setattr(realign, "solve_two_teacher", solving)
    monkeypatch.setattr(gate, "answer_accuracy", checking)
    base = Method("default", quick(max_samples=24))
    found = tune(model, **{**DATA, "base": base, "utility": rows(70, poisoned=[1, 5]), "trials": 2})
    assert len(checked) == 2 + len(found.held_out) - (found.config == base.config) + 1
    assert all(each == checked[0] for each in checked) and len(checked[0]) >= 20
    assert not checked[0] & (fitted | {1, 5})
    assert {e.settings["answer_rows"] for e in found.held_out.values()} == {"rows that the repair did not use"}


class TestSpaces:
    @pytest.mark.parametrize("selection", CHOICES["selection"])
    @pytest.mark.parametrize("form", [*CHOICES["method"], "sum", "one_shot"])
    def test_the_default_is_among_the_values(self, form: str, selection: str) -> None:
        config = OF_FORM.get(form) or NLSRConfig(method=form)
        space = default_space(config.replace(selection=selection))
        assert space and all(getattr(NLSRConfig(), name) in values for name, values in space.items())

    @pytest.mark.parametrize("form", [*CHOICES["method"], "sum", "one_shot"])
    def test_every_knob_changes_the_repair(self, model: PeftModel, make_pico_lora: MakeLora, form: str) -> None:
        config = (OF_FORM.get(form) or NLSRConfig(method=form)).replace(**QUICK, leave_intact=False)
        config = config.replace(safety_layers="0-1", score="wanda" if form == "antidote" else config.score)
        reference = factors_of(make_pico_lora(seed=0 if form == "sum" else 7))
        given = {name: DATA[name] for name in ("calibration", "utility", "tokenizer", "progress")}
        planner = Planner(model, judge=refuses_attacks, **given)

        def made(**changes: Any) -> str:
            method = Method("m", config.replace(**changes), reference=None if form == "antidote" else reference)
            return fingerprint(planner.plan(method).realignment.updates)

        for name, values in default_space(config).items():
            others = [value for value in values if value != getattr(config, name)]
            assert any(made(**{name: value}) != made() for value in others), name

    @pytest.mark.parametrize("changes", [{}, {"refused_prompts": "drop"}, {"correct_drift": False}], ids=str)
    def test_a_plan_beside_others_is_that_of_a_repair_alone(self, model: PeftModel, changes: dict[str, Any]) -> None:
        given = {name: DATA[name] for name in ("tokenizer", "progress")}
        given |= {"calibration": rows(4, poisoned=range(4)), "utility": rows(12, poisoned=[1, 5])}
        given |= {"judge": refuses_attacks}
        planner, config = Planner(model, **given), quick(leave_intact=False)
        planner.plan(Method("another", config))
        beside = planner.plan(Method("m", config.replace(**changes))).realignment
        alone = plan(model, config.replace(**changes), **given)
        assert apart(beside.updates, alone.updates) < 1e-4, "in another order of the examples"
        assert (apart(plan(model, config, **given).updates, alone.updates) < 1e-4) == (not changes)

    def test_a_method_without_a_space_asks_for_one(self, model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(tuning.SPACES, "resta")
        with pytest.raises(ValueError, match="method='resta' has no default space"):
            tune(model, **{**DATA, "base": Method("resta", quick(method="resta")), "space": None})


class TestArguments:
    def test_masks_are_searched_with_one_calibration(
        self, model: PeftModel, make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from peft_nlsr import planning

        calls: list[int] = []
        real = planning.calibrate
        monkeypatch.setattr(planning, "calibrate", lambda *a, **k: calls.append(1) or real(*a, **k))
        base = Method("sum", quick(update="sum"), reference=factors_of(make_pico_lora(seed=0)))
        found = tune(model, searcher="grid", **{**DATA, "base": base, "space": None, "trials": 5})
        assert len(found.trials) >= 5 and len(calls) == 1
        assert found.settings["space"] == {name: list(values) for name, values in default_space(base.config).items()}

    @pytest.mark.parametrize("searcher", ["grid", "optuna"])
    def test_methods_are_searched_and_what_cannot_be_used_is_said(self, model: PeftModel, searcher: str) -> None:
        space = {"method": ("nlsr", "safelora", "resta"), "update": ("auto", "sum")}
        base = Method("default", quick())
        found = tune(model, searcher=searcher, **{**DATA, "base": base, "space": space, "trials": 7})
        refused = {(t.settings["method"], t.settings["update"]): t.refused for t in found.trials if t.refused}
        assert len(found.trials) == 6 and found.trials[0].refused is None
        assert "base model" in refused["safelora", "auto"] and "base model" in refused["nlsr", "sum"]
        assert found.config.method == "nlsr" and found.config.update == "auto"
        assert all(t.harm is None and t.cost(1.0) == math.inf for t in found.trials if t.refused)
        json.dumps(found.to_dict(), allow_nan=False)

    def test_a_default_that_cannot_be_used_is_an_error(self, model: PeftModel) -> None:
        with pytest.raises(PeftNLSRError, match="base model"):
            tune(model, **{**DATA, "base": Method("sum", quick(update="sum")), "space": {"beta": (0.5,)}})

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"space": {"nothing": (1,)}}, "'nothing'"),
            ({"space": {"ridge": ()}}, "'ridge' with 0 values"),
            ({"space": {"ridge": (-1.0,)}}, "ridge"),
            ({"space": {}}, "space is empty"),
            ({"trials": 0}, "at least one"),
            ({"evaluation": replace(EVALUATION, prompts=EVALUATION.prompts[1:])}, "kind 'safety'"),
            ({"searcher": "magic"}, "auto, optuna, grid"),
        ],
    )
    def test_wrong_arguments_are_named(self, model: PeftModel, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            tune(model, **{**DATA, **changes})

    def test_prompts_of_the_training_data_are_refused(self, model: PeftModel) -> None:
        with pytest.raises(IncompatibleError, match="benign-3"):
            tune(model, **{**DATA, "utility": [*rows(6), {"prompt": "paint a word23", "response": "no"}]})

    def test_without_optuna_the_grid_is_searched(self, model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
        from importlib.util import find_spec

        from peft_nlsr import PeftNLSRError, tuning

        monkeypatch.setattr(
            tuning.importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name)
        )
        assert tune(model, **{**DATA, "trials": 2}).settings["searcher"] == "grid"
        with pytest.raises(PeftNLSRError, match=r"peft-nlsr\[tune\]"):
            tune(model, searcher="optuna", **DATA)
