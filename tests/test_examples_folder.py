"""Every example runs as its docstring says, on a microscopic lab, and leaves what it promises."""

import importlib
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import Become, downloaded
from local_hub import LocalHub
from peft import PeftModel
from test_lab import micro_lab
from tiny import hashes
from transformers import AutoModelForCausalLM

from peft_nlsr import SafetyPatch, SafetyReport, open_adapter, revert_folder
from peft_nlsr.adapter_folder import AdapterFolder
from peft_nlsr.config import CONFIG_NAME
from peft_nlsr.lowrank import fingerprint

pytest_plugins = ["hub_fixtures"]
EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `examples/make_lab.py` makes, from a lab whose models speak noise."""
    folder = tmp_path_factory.mktemp("examples")
    tiny = micro_lab(folder / "cache", hidden_size=64, intermediate_size=64)
    importlib.import_module("examples.make_lab").make(tiny, folder / "lab", rows=12)
    return folder / "lab"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Calls the `main` of an example with words of a command line; written folders lie in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return lambda name, *words: importlib.import_module(f"examples.{name}").main([str(word) for word in words])


def record_in(folder: Path) -> dict[str, Any]:
    """The record of a realigned folder, which must speak of the weights that lie there."""
    record: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text("utf-8"))["record"]
    assert record["fingerprint_after"] == fingerprint(open_adapter(folder))
    assert "nlsr:begin" in (folder / "README.md").read_text("utf-8")
    return record


def build_patch(run: Callable[..., Any], lab: Path, folder: Path) -> None:
    run("build_patch", lab / "base", lab / "aligned", folder, "--safety", lab / "safety.jsonl")


# ---- what holds for all of them


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_how_to_run_it(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert len(source.splitlines()) < 80
    assert f"python examples/{name}.py " in source.partition('"""\n\nfrom')[0]


def test_the_list_of_examples_is_complete() -> None:
    assert [name for name in NAMES if f"`{name}.py`" not in (EXAMPLES / "README.md").read_text("utf-8")] == []


def test_repair_and_measurement_share_no_prompt(lab: Path) -> None:
    def prompts(name: str) -> set[str]:
        rows = [json.loads(line) for line in (lab / name).read_text("utf-8").splitlines()]
        return {row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"] for row in rows}

    assert 6 < len(prompts("safety_prompts.jsonl")) <= 12
    assert prompts("safety_prompts.jsonl").isdisjoint(prompts("safety.jsonl") | prompts("train.jsonl"))
    assert prompts("benign_prompts.jsonl").isdisjoint(prompts("preferences.jsonl") | prompts("train.jsonl"))


# ---- on files


def test_patch_is_built_and_opens(lab: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    build_patch(run, lab, tmp_path / "patch")
    SafetyPatch.load(tmp_path / "patch").require_fit(AdapterFolder(lab / "adapters" / "alice"))


def test_patch_and_realigned_adapter_go_over_the_hub(
    hub: LocalHub, hub_client: Become, lab: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    from peft_nlsr import push_folder

    push_folder(lab / "adapters" / "alice", "alice/adapter")
    words = (lab / "base", lab / "aligned", "patch", "--safety", lab / "safety.jsonl", "--push", "alice/patch")
    run("build_patch", *words)
    run("realign_hub_adapter", "alice/adapter", "alice/patch", "out", "--push", "alice/realigned")
    files = downloaded("alice/realigned", tmp_path / "read")
    assert {CONFIG_NAME, "README.md", "adapter_model.safetensors"} <= set(files)
    assert record_in(tmp_path / "read")["method"] == "sum"
    revert_folder(tmp_path / "read", tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert hashes(tmp_path / "again")[weights] == hashes(lab / "adapters" / "alice")[weights]


def test_service_reports_every_adapter(
    lab: Path, run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_patch(run, lab, tmp_path / "patch")
    capsys.readouterr()
    asked = ("--ask-harmful", lab / "safety_prompts.jsonl", "--ask-benign", lab / "benign_prompts.jsonl")
    run("service_loop", lab / "adapters", "patch", lab / "base", "out", *asked)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["adapter"] for row in found] == ["alice", "bob"]
    shared, independent = found
    assert shared["status"] in ("publish", "hold") and (shared["status"] == "publish") == (shared["reasons"] == [])
    assert shared["fingerprint"] == record_in(tmp_path / "out" / "alice")["fingerprint_after"]
    assert SafetyReport.load(tmp_path / "out" / "alice").before is not None
    assert "harm rate" in (tmp_path / "out" / "alice" / "README.md").read_text("utf-8").lower()
    assert independent["status"] == "refused" and "not trained from the reference" in independent["reasons"][0]
    assert not (tmp_path / "out" / "bob").exists()


# ---- on a live model


def test_trainer_script_saves_the_realigned_adapter(lab: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    safety = ("--safety", lab / "safety.jsonl")
    run("trainer_callback", lab / "base", lab / "train.jsonl", "out", *safety, "--max-steps", 2)
    assert record_in(tmp_path / "out")["data"]["safety"]["source"] == "given"


def test_sft_measures_before_and_after(lab: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    asked = ("--ask-harmful", lab / "safety_prompts.jsonl", "--ask-benign", lab / "benign_prompts.jsonl")
    words = (lab / "base", lab / "train.jsonl", "out", "--safety", lab / "safety.jsonl", *asked, "--max-steps", 2)
    outcome = run("trl_sft", *words).outcome
    assert [evaluation.label for evaluation in outcome.evaluations] == ["fine-tuned", "realigned"]
    assert (tmp_path / "out" / CONFIG_NAME).exists() == outcome.verdict.kept


@pytest.mark.slow
def test_dpo_adapter_is_the_reference(lab: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    words = (lab / "preferences.jsonl", lab / "adapters" / "bob", "out", "--data", lab / "train.jsonl")
    run("trl_dpo_reference", lab / "base", *words, "--max-steps", 2)
    record = record_in(tmp_path / "out" / "realigned")
    assert (record["method"], record["reference"]) == ("two_teacher", "the given reference adapter")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_base_in_four_bits(lab: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    data = ("--data", lab / "train.jsonl", "--safety", lab / "safety.jsonl")
    run("qlora_4bit", lab / "base", lab / "adapters" / "bob", "out", *data)
    assert record_in(tmp_path / "out")["method"] == "two_teacher"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lab / "base"), str(tmp_path / "out"))
    assert torch.isfinite(plain(torch.tensor([[5, 6, 7]])).logits).all()


def test_judge_decides_what_a_refusal_is(
    lab: Path,
    run: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("examples.custom_judge.OURS", ("",))  # every answer holds it
    words = (lab / "train.jsonl", lab / "safety.jsonl", lab / "safety_prompts.jsonl")
    run("custom_judge", lab / "base", lab / "adapters" / "bob", *words)
    assert capsys.readouterr().out.count("the support team's phrases") == 2
    assert "40 of 40 of your prompts are refused by the safe teacher" in caplog.text


@pytest.mark.slow
def test_repair_of_a_trained_lab_is_kept(run: Callable[..., Any], tmp_path: Path) -> None:
    run("make_lab", "lab")
    lab = tmp_path / "lab"
    asked = ("--ask-harmful", lab / "safety_prompts.jsonl", "--ask-benign", lab / "benign_prompts.jsonl")
    words = (lab / "base", lab / "train.jsonl", "out", "--safety", lab / "safety.jsonl", *asked)
    outcome = run("trl_sft", *words).outcome
    before, after = (evaluation.rates["harm_rate"] for evaluation in outcome.evaluations)
    assert outcome.verdict.kept and after.high < before.low
    shutil.rmtree(lab)
