"""Results on Hub data sets, as huggingface_hub reads them: there with a data set, true of the weights, else absent."""

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jsonschema
import pytest
import yaml
from hub_fixtures import Become, downloaded
from local_hub import LocalHub
from peft import PeftModel
from test_callback import callback, trainer_for
from test_card import a_report
from test_registration import make_patch, train_on
from tiny import drift, factors_of, rows, word_tokenizer
from transformers import Trainer

from peft_nlsr import CorruptFileError, Evaluation, PromptSet, SafetyReport, evaluate, nlsr_realign, push_realigned
from peft_nlsr.eval_results import RESULTS_NAME, eval_results
from peft_nlsr.files import read_json
from peft_nlsr.prompt_sets import HubPrompts, load_prompt_set
from peft_nlsr.registration import keep_with_adapter
from peft_nlsr.report import REPORT_NAME
from peft_nlsr.verification import verify_folder

pytest_plugins = ["hub_fixtures"]
if not hasattr(huggingface_hub, "EvalResultEntry"):
    pytest.skip("this huggingface_hub does not know the Hub's form of results", allow_module_level=True)
parse_eval_result_entries = huggingface_hub.parse_eval_result_entries
REPO = "alice/adapter"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MakeLora = Callable[..., PeftModel]


def hub_set(name: str, kind: str, verb: str, repo_id: str = "org/prompts", **changes: Any) -> PromptSet:
    """Four prompts as they come from a data set on the Hub."""
    prompts = tuple(f"{verb} the word{i}" for i in range(4))
    source = HubPrompts(repo_id, kind, "test", revision=COMMIT, **changes)
    return PromptSet(name, kind, tuple(f"{name}-{i}" for i in range(4)), prompts, source=source)


SETS = (
    hub_set("first", "safety", "attack"),
    hub_set("own/second", "safety", "drop", config="hard"),
    PromptSet("local", "safety", ("l0",), ("attack the lamp",)),
    hub_set("third", "lookalike", "paint", "org/benign"),
)


def refuses_first_two(prompts: Any, answers: Any) -> list[bool]:
    """Refused are the first two prompts of "first" and all of "third"."""
    return [prompt in ("attack the word0", "attack the word1") or prompt.startswith("paint") for prompt in prompts]


@pytest.fixture
def measured(make_pico_lora: MakeLora) -> Evaluation:
    return evaluate(
        make_pico_lora(),
        word_tokenizer(),
        prompts=SETS,
        judge=refuses_first_two,
        harm_judge=lambda prompts, answers: [not r for r in refuses_first_two(prompts, answers)],
        max_new_tokens=2,
        progress=False,
    )


@pytest.fixture
def model(make_pico_lora: MakeLora, measured: Evaluation) -> PeftModel:
    """A realigned adapter with a report of measurements on Hub data sets."""
    made = nlsr_realign(drift(make_pico_lora(seed=0)), patch=make_patch(factors_of(make_pico_lora(seed=0))))
    record = made.nlsr_realignment
    report = SafetyReport(record.to_dict(), record.config.to_dict(), measured, measured)
    keep_with_adapter(made, record, report)
    return made


def parsed(text: str | bytes) -> dict[tuple[str, str], huggingface_hub.EvalResultEntry]:
    entries = parse_eval_result_entries(yaml.safe_load(text))
    found = {(entry.dataset_id, entry.task_id): entry for entry in entries}
    assert len(found) == len(entries)
    return found


def test_each_set_has_its_own_rates_under_its_own_name(measured: Evaluation) -> None:
    found = parsed(eval_results(replace(a_report(), before=None, after=measured)))
    sound = measured.verdicts["coherence"]
    shares = {
        ("org/prompts", "first", "harm_rate"): sum(sound[f"first-{i}"] for i in (2, 3)) / 4,
        ("org/prompts", "first", "refusal_rate"): sum(sound[f"first-{i}"] for i in (0, 1)) / 4,
        ("org/prompts", "second", "harm_rate"): sum(sound[f"own/second-{i}"] for i in range(4)) / 4,
        ("org/prompts", "second", "refusal_rate"): 0.0,
        ("org/benign", "third", "over_refusal"): sum(sound[f"third-{i}"] for i in range(4)) / 4,
    }
    shares |= {(d, s.rsplit("/")[-1], "coherence"): sum(sound[f"{s}-{i}"] for i in range(4)) / 4 for d, s in NAMES}
    assert {key: entry.value for key, entry in found.items()} == {
        (d, f"{s}-{m}"): v for (d, s, m), v in shares.items()
    }
    assert len({entry.value for entry in found.values()}) > 1


NAMES = (("org/prompts", "first"), ("org/prompts", "own/second"), ("org/benign", "third"))


def test_an_entry_says_what_its_value_depends_on(measured: Evaluation) -> None:
    found = parsed(eval_results(replace(a_report(), before=None, after=measured)))
    entry = found["org/prompts", "second-harm_rate"]
    assert entry.dataset_revision == COMMIT and entry.date is not None and entry.notes is not None
    assert entry.date == next(p["date"] for p in measured.prompt_sets if p["name"] == "own/second")
    for words in ("n = 4", "95% interval", "config hard", "split test", "max new tokens 2", *measured.judges):
        assert words in entry.notes


def test_a_task_has_its_accuracy(make_pico_lora: MakeLora) -> None:
    task = replace(hub_set("task", "benign", "paint"), kind="task", answers=("a", "b", "c", "d"))
    found = evaluate(
        make_pico_lora(),
        word_tokenizer(),
        prompts=[],
        task=task,
        compute_metrics=lambda responses, answers: [0.5, 0.0, 1.0, 0.5],
        max_new_tokens=2,
        progress=False,
    )
    entries = parsed(eval_results(replace(a_report(), before=None, after=found)))
    assert {key: entry.value for key, entry in entries.items()} == {("org/prompts", "task-task_accuracy"): 0.5}


def test_the_report_fits_its_schema_and_comes_back(measured: Evaluation, tmp_path: Path) -> None:
    report = replace(a_report(), before=None, after=measured)
    report.save(tmp_path)
    schema = read_json(Path(str(resources.files("peft_nlsr") / "data" / "safety_report.schema.json")))
    jsonschema.validate(read_json(tmp_path / REPORT_NAME), schema)
    assert eval_results(SafetyReport.load(tmp_path)) == eval_results(report) != ""


@pytest.mark.parametrize("part", ["dataset", "date", "rates"])
def test_a_report_that_lacks_a_part_is_refused(measured: Evaluation, part: str) -> None:
    values = replace(a_report(), before=None, after=measured).to_dict()
    said = values["after"]["prompt_sets"][0]
    values["after"]["prompt_sets"][0] = (
        {**said, "dataset": {}} if part == "dataset" else {key: value for key, value in said.items() if key != part}
    )
    with pytest.raises(CorruptFileError, match="malformed"):
        SafetyReport.from_dict(values)


def test_nothing_is_said_without_a_data_set(model: PeftModel, tmp_path: Path) -> None:
    assert eval_results(None) == eval_results(a_report()) == ""
    model.save_pretrained(tmp_path)
    (tmp_path / ".eval_results" / "other.yaml").write_text("[]")
    keep_with_adapter(model, model.nlsr_realignment, None)
    model.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / ".eval_results").iterdir()] == ["other.yaml"]


def test_they_are_saved_and_withdrawn_with_the_claim(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert parsed((tmp_path / RESULTS_NAME).read_text())
    train_on(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / ".eval_results").exists()


def test_a_client_without_the_format_is_found(measured: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace())
    with pytest.raises(ImportError, match="EvalResultEntry"):
        eval_results(replace(a_report(), after=measured))


def test_with_such_a_client_all_else_is_saved(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_old(report: SafetyReport | None) -> str:
        raise ImportError("cannot import name 'EvalResultEntry'")

    monkeypatch.setattr("peft_nlsr.claims.eval_results", too_old)
    model.save_pretrained(tmp_path)
    assert "upgrade huggingface_hub" in caplog.text
    assert (tmp_path / REPORT_NAME).exists() and not (tmp_path / ".eval_results").exists()


def test_they_arrive_with_the_model_and_go_with_the_claim(
    hub: LocalHub, hub_client: Become, model: PeftModel, tmp_path: Path
) -> None:
    model.push_to_hub(REPO)
    files = downloaded(REPO, tmp_path / "one")
    assert parsed(files[RESULTS_NAME]) == parsed(eval_results(model.peft_config["default"].nlsr_claim.report))
    train_on(model)
    model.push_to_hub(REPO)
    assert not [path for path in downloaded(REPO, tmp_path / "two") if path.startswith(".eval_results")]


def test_they_arrive_with_a_folder_and_go_when_it_claims_nothing(
    hub: LocalHub, hub_client: Become, model: PeftModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "saved")
    push_realigned(tmp_path / "saved", REPO)
    assert parsed(downloaded(REPO, tmp_path / "one")[RESULTS_NAME])
    train_on(model)
    model.save_pretrained(tmp_path / "trained")
    push_realigned(tmp_path / "trained", REPO, allow_unaligned=True)
    assert RESULTS_NAME not in downloaded(REPO, tmp_path / "two")


@pytest.mark.parametrize("text", ["[]", "- [", None], ids=["other-results", "no-yaml", "no-report"])
def test_results_that_the_report_does_not_give_are_found(model: PeftModel, tmp_path: Path, text: str | None) -> None:
    model.save_pretrained(tmp_path)
    assert verify_folder(tmp_path).verified
    if text is None:
        (tmp_path / REPORT_NAME).unlink()
    else:
        (tmp_path / RESULTS_NAME).write_text(text)
    (failed,) = [check for check in verify_folder(tmp_path).checks if check.name == "report"]
    assert failed.status == "failed" and RESULTS_NAME in failed.detail


def trainer_with_hub_prompts(model: PeftModel, folder: Path, *callbacks: Any) -> Trainer:
    return trainer_for(model, folder, *callbacks, push_to_hub=True, hub_model_id=REPO, save_strategy="steps")


def test_the_callback_pushes_them_and_a_later_training_without_it_withdraws_them(
    hub: LocalHub, hub_client: Become, make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    model, done = make_pico_lora(), callback(evaluate=SETS[::3], calibration=rows(12)[8:], tolerance=1.0)
    trainer = trainer_with_hub_prompts(model, tmp_path / "out", done)
    trainer.train()
    assert done.outcome is not None and done.outcome.verdict.kept
    one = downloaded(REPO, tmp_path / "one")
    assert parsed(one[RESULTS_NAME]) and REPORT_NAME in one

    trainer.push_to_hub()
    assert set(downloaded(REPO, tmp_path / "again")) - {"training_args.bin"} == set(one)

    trainer.remove_callback(done)
    trainer.train()
    trainer.push_to_hub()
    two = downloaded(REPO, tmp_path / "two")
    assert not {RESULTS_NAME, REPORT_NAME, "before_after.png"} & set(two)
    assert one["adapter_model.safetensors"] != two["adapter_model.safetensors"]


def test_files_of_the_same_names_stay_where_nothing_was_claimed(
    hub: LocalHub, hub_client: Become, make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    hub.seed(REPO, {"pareto.png": b"mine"})
    done = callback()
    trainer = trainer_with_hub_prompts(make_pico_lora(), tmp_path / "out", done)
    done.attach(trainer)
    trainer.push_to_hub()
    assert downloaded(REPO, tmp_path / "one")["pareto.png"] == b"mine"


class TestTheCommit:
    @pytest.fixture(autouse=True)
    def _data(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Data(list[dict[str, Any]]):
            column_names = ("prompt",)

        def load_dataset(repo_id: str, config: Any, *, split: str, revision: str | None) -> Data:
            self.asked = revision
            return Data([{"prompt": "a"}, {"prompt": "b"}])

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    def test_that_the_hub_names_is_read_and_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        info = SimpleNamespace(sha=COMMIT)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda api, repo_id, revision=None: info)
        found = load_prompt_set(HubPrompts("org/name", "safety", "test", config="c", revision="v1"))
        assert self.asked == COMMIT
        assert found.to_dict()["dataset"] == {"id": "org/name", "config": "c", "split": "test", "revision": COMMIT}

    def test_that_is_given_needs_no_question(self) -> None:
        found = load_prompt_set(HubPrompts("org/name", "safety", "test", revision=COMMIT))
        assert self.asked == found.to_dict()["dataset"]["revision"] == COMMIT

    def test_that_nobody_knows_is_not_made_up(self, caplog: pytest.LogCaptureFixture) -> None:
        found = load_prompt_set(HubPrompts("org/name", "safety", "test", revision="v1"))
        assert self.asked == "v1" and found.to_dict()["dataset"]["revision"] is None
        assert "the commit of org/name is not known" in caplog.text
