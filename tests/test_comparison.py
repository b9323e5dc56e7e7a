"""A comparison measures every row on the same prompts, leaves the model as it was, and goes on where it stopped."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from tiny import assert_same_state, drift, factors_of, quick, refuses_attacks, rows, state_of, word_tokenizer

from peft_nlsr import (
    Comparison,
    CorruptFileError,
    EvaluationSettings,
    IncompatibleError,
    LowRank,
    Method,
    NLSRConfig,
    PeftNLSRError,
    PromptSet,
    compare,
    evaluate,
    mcnemar,
    measuring,
)
from peft_nlsr.controls import CONTROLS
from peft_nlsr.examples import read_examples, sample
from peft_nlsr.generation import generate_answers

MakeLora = Callable[..., PeftModel]
TOKENIZER = word_tokenizer()


def prompt_set(kind: str, *prompts: str, answers: tuple[str, ...] | None = None) -> PromptSet:
    return PromptSet(kind, kind, tuple(f"{kind}-{i}" for i in range(len(prompts))), prompts, answers)


def noisy(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """A harm judge under which models that say something else differ."""
    return [len(response) % 2 == 0 for response in responses]


EVALUATION = EvaluationSettings(
    prompts=(
        prompt_set("safety", *(f"attack the word{i}" for i in range(20, 26))),
        prompt_set("benign", "paint a lamp", "how to paint"),
    ),
    task=prompt_set("task", "the lamp", "a vase", answers=("sure", "no")),
    judge=refuses_attacks,
    harm_judge=noisy,
    max_new_tokens=4,
)
DATA = {
    "calibration": rows(4, poisoned=range(4)),
    "utility": rows(6, poisoned=[1]),
    "benign": rows(5),
    "tokenizer": TOKENIZER,
    "progress": False,
    "evaluation": EVALUATION,
}


@pytest.fixture
def model(make_pico_lora: MakeLora) -> PeftModel:
    return drift(make_pico_lora(seed=0))


@pytest.fixture
def safe(make_pico_lora: MakeLora) -> dict[str, LowRank]:
    return factors_of(make_pico_lora(seed=0))


def methods(safe: Any) -> list[Method]:
    return [Method("sum", quick(update="sum"), reference=safe), Method("two-teacher", quick())]


def spoken(model: PeftModel, asked: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The requests, tokenised, with the model's own answers: it predicts every token of them."""
    examples = read_examples(iter(asked), TOKENIZER, limit=len(asked), max_length=64)
    prompts = [example.prompt for example in examples]
    answers = generate_answers(model, TOKENIZER, prompts, max_new_tokens=4, batch_size=8)
    return [{"prompt_ids": p, "completion_ids": a} for p, a in zip(prompts, answers, strict=True)]


def _norm(model: PeftModel) -> float:
    """Of the whole adapter, which is the most that shrinking it can change."""
    return sum(update.norm() ** 2 for update in factors_of(model).values()) ** 0.5


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the evaluations that were really made."""
    labels: list[str] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        labels.append(kwargs["label"])
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(measuring, "evaluate", counting)
    return labels


class TestCompare:
    def test_all_rows_are_there_and_the_model_is_as_it_was(self, model: PeftModel, safe: Any) -> None:
        before = state_of(model.train())
        asked = [methods(safe)[0], Method("two-teacher", quick(ridge=10.0))]  # changes less than removing the adapter
        found = compare(model, asked, **DATA)
        assert_same_state(before, state_of(model))
        expected = ["fine-tuned"]
        for name, controls in (("sum", CONTROLS), ("two-teacher", ("adapter removed", "scaled", "benign"))):
            expected += [name, *(f"{control}, for {name}" for control in controls)]
        assert list(found.names) == expected
        assert all(row.evaluation is not None and row.refused is None for row in found.rows)
        assert all(row.evaluation.prompt_sets == found.rows[0].evaluation.prompt_sets for row in found.rows)

    def test_a_row_is_what_the_realigned_model_does(self, model: PeftModel, safe: Any) -> None:
        from peft_nlsr import nlsr_realign

        (_, row) = compare(model, methods(safe)[1:], controls=(), **DATA).rows
        data = {key: DATA[key] for key in ("calibration", "utility", "tokenizer", "progress")}
        nlsr_realign(model, quick(), judge=refuses_attacks, **data)
        alone = EVALUATION.evaluate(model, TOKENIZER, "alone", progress=False)
        assert row.evaluation is not None and row.evaluation.verdicts == alone.verdicts
        assert row.size is not None and row.size.modules == 6

    def test_every_method_is_a_column_beside_its_controls(self, model: PeftModel, make_pico_lora: MakeLora) -> None:
        delta, matched = factors_of(make_pico_lora(seed=7)), ("random", "reset", "scaled")
        settings = {"fgsn": {"safety_layers": "0-1"}, "safelora": {}, "antidote": {"score": "wanda"}, "resta": {}}
        asked = [
            Method(name, quick(method=name, **more), reference=None if name == "antidote" else delta)
            for name, more in settings.items()
        ]
        before = state_of(model)
        found = compare(model, asked, controls=matched, **DATA)
        assert_same_state(before, state_of(model))
        rows_of = {row.name: row for row in found.rows}
        for name in settings:
            row = rows_of[name]
            assert row.refused is None and row.evaluation is not None and row.size is not None and row.size.modules
            controls = [
                rows_of[f"{c}, for {name}"] for c in ("adapter removed", *matched) if f"{c}, for {name}" in rows_of
            ]
            assert controls and all(control.refused is None and control.size is not None for control in controls)
            assert controls[-1].size.norm == pytest.approx(min(row.size.norm, _norm(model)), rel=1e-3)
            assert f"| {name} |" in found.to_markdown()

    def test_equal_weights_are_measured_once(self, model: PeftModel, safe: Any, measured: list[str]) -> None:
        all_the_base = ("random", "reset", "transplant")
        found = compare(model, methods(safe)[1:], controls=all_the_base, **DATA)
        assert measured == ["fine-tuned", "two-teacher", "random, for two-teacher"]
        assert [row.evaluation.label for row in found.rows] == list(found.names)
        assert list(found.names) == ["fine-tuned", "two-teacher", "adapter removed, for two-teacher"]

    def test_controls_that_remove_the_adapter_are_one_row(
        self, model: PeftModel, safe: dict[str, LowRank], tmp_path: Path
    ) -> None:
        far = {name: LowRank(u.A, u.B, 9.0 * u.scale) for name, u in safe.items()}
        asked = [Method("far", quick(method="resta"), reference=far)]
        given = {"controls": ("random", "reset", "scaled"), "seeds": (0, 1), "resume": tmp_path / "r.json", **DATA}
        found = compare(model, asked, **given)
        removed = [row for row in found.rows if row.name == "adapter removed, for far"]
        assert len(found.rows) == 5 and [row.seed for row in removed] == [0, 1]
        said = "the change is larger than the adapter, so these controls are one (random, reset, scaled); "
        said += "compare the task"
        assert removed[0].said == said and said in found.to_markdown()
        assert removed[0].size is not None and removed[0].size.norm == pytest.approx(_norm(model), rel=1e-4)
        with model.disable_adapter():
            base = EVALUATION.evaluate(model, TOKENIZER, "base", progress=False)
        assert removed[0].evaluation is not None and removed[0].evaluation.verdicts == base.verdicts
        assert compare(model, asked, **given).rows == found.rows

    def test_controls_that_leave_something_stay_apart(self, model: PeftModel, safe: Any) -> None:
        found = compare(model, methods(safe)[:1], controls=("random", "reset", "scaled"), **DATA)
        assert list(found.names)[2:] == [f"{control}, for sum" for control in ("random", "reset", "scaled")]

    def test_with_utility_data_every_row_has_the_accuracy_on_its_answers(self, model: PeftModel, safe: Any) -> None:
        from peft_nlsr import nlsr_realign
        from peft_nlsr.gate import answer_accuracy

        given = {**DATA, "utility": spoken(model, rows(8, poisoned=[1, 5]))}
        found = compare(model, methods(safe), controls=("random",), **given)
        assert all("answer_accuracy" in row.evaluation.rates for row in found.rows if row.evaluation is not None)
        assert "| answer accuracy, % |" in found.to_markdown()

        def right(left_out: tuple[int, ...]) -> float:
            kept = [row for i, row in enumerate(given["utility"]) if i not in left_out]
            examples = read_examples(kept, TOKENIZER, limit=8, max_length=64)
            return answer_accuracy(model, examples, batch_size=4, pad_id=0).value

        tuned, taught = (found.evaluation(name).rates["answer_accuracy"] for name in ("fine-tuned", "two-teacher"))
        assert tuned.value == 1.0 and (tuned.n, taught.n) == (8, 6)
        data = {key: given[key] for key in ("calibration", "utility", "tokenizer", "progress")}
        nlsr_realign(model, quick(), judge=refuses_attacks, **data)
        assert taught.value == pytest.approx(right((1, 5))) and right((1, 5)) != right(())

    def test_rows_that_a_seeds_repair_was_fitted_to_are_not_measured(self, model: PeftModel, safe: Any) -> None:
        given = {**DATA, "utility": rows(200)}
        found = compare(model, methods(safe)[1:], controls=("scaled",), seeds=(0, 1), **given)
        measured = {e.index for e in sample(given["utility"], TOKENIZER, NLSRConfig(), times=2)[-128:]}
        for row in found.rows[1:]:
            config = quick(nlsr_seed=row.seed)
            fitted = {e.index for e in sample(given["utility"], TOKENIZER, config, times=2)[: config.max_samples]}
            assert row.evaluation is not None and bool(fitted & measured) == bool(row.seed)
            assert row.evaluation.rates["answer_accuracy"].n == len(measured - fitted)
            assert row.evaluation.settings["answer_rows"] == "rows that the repair did not use"
        assert "or that it was fitted to" in found.to_markdown() and "with the latter" not in found.to_markdown()

    def test_rows_of_the_repair_are_said_where_no_others_are_left(self, model: PeftModel, safe: Any) -> None:
        found = compare(model, methods(safe), controls=(), **DATA)
        said = {row.name: row.evaluation.settings.get("answer_rows") for row in found.rows if row.evaluation}
        assert said == {
            "fine-tuned": None,
            "sum": "rows that the repair did not use",
            "two-teacher": "rows of the repair",
        }
        assert "but of two-teacher with the latter, because fewer than 20" in found.to_markdown()

    def test_the_compared_adapter_answers_and_not_the_active_one(self, model: PeftModel, safe: Any) -> None:
        asked = [Method("sum", quick(update="sum", score="magnitude"), reference=safe)]
        given = {**DATA, "utility": spoken(model, rows(8))}
        alone = compare(model, asked, controls=(), **given)
        assert alone.rows[0].evaluation is not None
        assert alone.rows[0].evaluation.rates["answer_accuracy"].value == 1.0
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        beside = compare(model, asked, controls=(), adapter_name="default", **given)
        assert model.active_adapter == "other"
        pairs = zip(alone.rows, beside.rows, strict=True)
        assert all(one.evaluation.rates == other.evaluation.rates for one, other in pairs)
        assert all(one.evaluation.settings["fingerprint"] == one.fingerprint for one in beside.rows)

    def test_without_utility_data_there_is_no_such_column(self, model: PeftModel, safe: Any) -> None:
        found = compare(model, methods(safe)[:1], controls=(), **{**DATA, "utility": None})
        assert "answer accuracy" not in found.to_markdown()

    def test_a_plan_that_is_no_sense_is_refused_in_its_row(self, model: PeftModel, safe: Any) -> None:
        odd = Method("odd", quick(update="sum", score="snip", sequential=True), reference=safe)
        found = compare(model, [odd, *methods(safe)[1:]], controls=("scaled",), **DATA)
        refused = {row.name for row in found.rows if row.refused is not None}
        assert refused == {"odd", "scaled, for odd"} and "sequential" in str(found.rows[1].refused)

    def test_benign_rows_that_are_prompts_are_refused(self, model: PeftModel, safe: Any) -> None:
        with pytest.raises(IncompatibleError, match="benign-0"):
            compare(model, methods(safe), **{**DATA, "benign": [{"prompt": "paint a  Lamp", "response": "no"}]})

    def test_what_cannot_be_done_is_said_in_its_row(self, model: PeftModel, make_pico_lora: MakeLora) -> None:
        other = factors_of(make_pico_lora(seed=7))
        found = compare(
            model,
            [Method("sum", quick(update="sum"), reference=other), Method("two-teacher", quick())],
            controls=("benign",),
            **{**DATA, "benign": None},
        )
        refused = {row.name: row.refused for row in found.rows if row.refused is not None}
        assert set(refused) == {"sum", "benign, for sum", "benign, for two-teacher"}
        assert "not trained from the reference" in str(refused["sum"])
        assert "benign=" in str(refused["benign, for two-teacher"])
        assert "n/a" in found.to_markdown() and str(refused["sum"]) in found.to_markdown()

    def test_seeds_change_what_is_drawn(self, model: PeftModel, safe: Any) -> None:
        config = quick(update="sum", score="random", selection="bernoulli")
        found = compare(model, [Method("m", config, reference=safe)], controls=("random",), seeds=(0, 1, 2), **DATA)
        assert [row.seed for row in found.rows if row.name == "m"] == [0, 1, 2]
        for name in ("m", "random, for m"):
            assert len({row.fingerprint for row in found.rows if row.name == name}) == 3
        assert len(found.tests("m")) == 3 and "3 seeds" in found.to_markdown()

    def test_prompts_that_were_calibrated_on_are_refused(self, model: PeftModel, safe: Any) -> None:
        leaked = [{"prompt": "Attack  the word22", "response": "no"}]
        with pytest.raises(IncompatibleError, match="safety-2"):
            compare(model, methods(safe), **{**DATA, "calibration": leaked})

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"methods": []}, "names of their own"),
            ({"methods": [Method("a", quick()), Method("a", quick())]}, "names of their own"),
            ({"methods": [Method("fine-tuned", quick())]}, "names of their own"),
            ({"controls": ("nothing",)}, "random, reset, scaled, transplant, benign"),
            ({"seeds": ()}, "at least one seed"),
            ({"seeds": (1, 1)}, "none twice"),
        ],
    )
    def test_wrong_arguments_are_named(self, model: PeftModel, changes: dict[str, Any], words: str) -> None:
        given = {"methods": [Method("a", quick())], **DATA, **changes}
        with pytest.raises(ValueError, match=words):
            compare(model, given.pop("methods"), **given)


class TestResume:
    def run(self, model: Any, safe: Any, path: Path, **changes: Any) -> Comparison:
        given = {"controls": ("random", "scaled"), "resume": path, **DATA, **changes}
        return compare(model, methods(safe)[:1], **given)

    def test_finished_rows_are_not_made_again(
        self, model: PeftModel, safe: Any, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(*args: Any, **kwargs: Any) -> Any:
            if len(measured) == 2:
                raise KeyboardInterrupt
            measured.append(kwargs["label"])
            return evaluate(*args, **kwargs)

        path, before = tmp_path / "rows.json", state_of(model)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(measuring, "evaluate", failing)
            self.run(model, safe, path)
        assert_same_state(before, state_of(model))
        resumed = self.run(model, safe, path)
        assert measured == ["fine-tuned", "sum", "random, for sum", "scaled, for sum"]
        whole = self.run(model, safe, tmp_path / "whole.json")
        assert [row.fingerprint for row in resumed.rows] == [row.fingerprint for row in whole.rows]
        assert [row.evaluation.verdicts for row in resumed.rows] == [row.evaluation.verdicts for row in whole.rows]

    @pytest.mark.parametrize("what", ["utility", "evaluation", "model"])
    def test_results_of_another_run_are_refused(
        self, model: PeftModel, safe: Any, tmp_path: Path, what: str, make_pico_lora: MakeLora
    ) -> None:
        path = tmp_path / "rows.json"
        self.run(model, safe, path)
        changes: dict[str, Any] = {"utility": {"utility": rows(7)}, "evaluation": {}, "model": {}}[what]
        if what == "evaluation":
            changes = {"evaluation": EvaluationSettings(EVALUATION.prompts, judge=refuses_attacks, max_new_tokens=3)}
        if what == "model":
            model = drift(make_pico_lora(seed=0), seed=4)
        with pytest.raises(IncompatibleError, match="file of its own"):
            self.run(model, safe, path, **changes)

    def test_a_broken_file_is_named(self, model: PeftModel, safe: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_text("{")
        with pytest.raises(CorruptFileError, match=r"rows\.json is not JSON"):
            self.run(model, safe, tmp_path / "rows.json")

    def test_neither_prompts_nor_answers_nor_paths_are_written(
        self, model: PeftModel, safe: Any, tmp_path: Path
    ) -> None:
        found = self.run(model, safe, tmp_path / "rows.json")
        found.save(tmp_path / "comparison.json")
        for path in tmp_path.iterdir():
            text = path.read_text("utf-8")
            for word in ("attack the", "word2", "lamp", "vase", str(tmp_path)):
                assert word not in text, path


class TestComparison:
    @pytest.fixture
    def found(self, model: PeftModel, safe: Any) -> Comparison:
        return compare(model, methods(safe)[:1], controls=("random", "transplant"), seeds=(0, 1), **DATA)

    def test_it_comes_back_from_json(self, found: Comparison, tmp_path: Path) -> None:
        assert Comparison.load(found.save(tmp_path / "c.json")) == Comparison.from_dict(
            json.loads(json.dumps(found.to_dict()))
        )
        assert Comparison.load(tmp_path / "c.json").to_dict() == json.loads(json.dumps(found.to_dict()))
        with pytest.raises(CorruptFileError, match="schema version 1"):
            Comparison.from_dict({**found.to_dict(), "schema_version": 2})

    def test_each_row_is_paired_with_the_first(self, found: Comparison) -> None:
        first, after = found.rows[0].evaluation, found.rows[1].evaluation
        assert first is not None and after is not None
        for metric, test in found.tests("sum")[0].items():
            prompts = first.verdicts[metric]
            expected = mcnemar(list(prompts.values()), [after.verdicts[metric][p] for p in prompts])
            assert test == expected

    def test_over_seeds_the_mean_is_given_with_an_interval_at_least_as_wide_as_wilsons(
        self, found: Comparison
    ) -> None:
        rows = [row.evaluation for row in found.rows if row.name == "random, for sum"]
        pooled = found.evaluation("random, for sum")
        assert pooled is not None and len(rows) == 2
        values = [each.rates["harm_rate"] for each in rows if each is not None]
        mean = pooled.rates["harm_rate"]
        assert mean.value == pytest.approx(sum(v.value for v in values) / 2)
        assert mean.low <= min(mean.value, max(v.low for v in values)) and mean.high >= min(v.high for v in values)

    def test_the_table_has_a_line_per_name(self, found: Comparison) -> None:
        from rich.console import Console

        lines = found.to_markdown().splitlines()
        assert len([line for line in lines if line.startswith("|")]) == 2 + len(found.names)
        console = Console(width=80, file=io.StringIO())
        console.print(found.to_terminal())
        shown = console.file.getvalue()
        assert all(f"{name}: " in shown for name in found.names[1:]) and "refuses_attacks" in shown
        lines = [line for line in shown[: shown.index("judges:")].splitlines() if "(" in line]
        assert [line[: line.index("  ", 2)] for line in lines] == ["fine-tuned", "sum", "  random", "  transplant"]
        assert max(map(len, shown.splitlines())) <= 80

    def test_the_picture_names_every_row(self, found: Comparison) -> None:
        texts = [text.get_text() for legend in found.pareto().legends for text in legend.get_texts()]
        assert [text.split("  ")[1] for text in texts] == list(found.names)

    def test_an_unknown_name_is_refused(self, found: Comparison) -> None:
        with pytest.raises(ValueError, match="no row named 'nobody'"):
            found.evaluation("nobody")


def test_a_realigned_adapter_is_refused(model: PeftModel) -> None:
    from peft_nlsr import nlsr_realign

    data = {key: DATA[key] for key in ("calibration", "utility", "tokenizer", "progress")}
    nlsr_realign(model, quick(), judge=refuses_attacks, **data)
    with pytest.raises(PeftNLSRError, match="revert"):
        compare(model, [Method("m", quick())], **DATA)
    drift(model)  # trained on: now the fine-tuned adapter is another one, as for nlsr_realign
    found = compare(model, [Method("m", quick())], controls=(), **DATA)
    assert found.rows[1].refused is None


def test_of_several_realigned_adapters_every_one_is_refused(model: PeftModel) -> None:
    from peft_nlsr import nlsr_realign

    data = {key: DATA[key] for key in ("calibration", "utility", "tokenizer", "progress")}
    model.add_adapter("other", model.peft_config["default"])
    for name in ("default", "other"):
        model.set_adapter(name)
        nlsr_realign(model, quick(leave_intact=False), adapter_name=name, judge=refuses_attacks, **data)
    for name in ("default", "other"):
        model.set_adapter(name)
        with pytest.raises(PeftNLSRError, match=f"'{name}' is realigned already"):
            compare(model, [Method("m", quick())], adapter_name=name, **DATA)


@pytest.mark.slow
def test_on_the_lab_a_random_mask_is_worse_than_the_papers_and_that_worse_than_two_teachers() -> None:
    from benchmarks import compare as benchmark
    from peft_nlsr.lab import Lab

    settings = {"prompts": 240, "paper": {"score": "wanda"}}
    found = benchmark.run_compare(Lab(), "hard", "shared", settings)
    assert found["ordered"] == found["apart"] == [True, True]
    audited = benchmark.run_audit(Lab(), "hard", "shared", settings)
    assert audited["poisoned"]["sources"]["True"]["share"] > 0.9
    assert max(audited["benign"]["total"]["share"], audited["poisoned"]["sources"]["False"]["share"]) < 0.02
