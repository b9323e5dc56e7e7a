"""The callback and the Hub: nothing unaligned is ever there, and a push that fails loses nothing."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import Become, downloaded
from local_hub import LocalHub
from test_callback import TOKENIZER, MakeLora, callback, safety_prompts, trainer_for
from tiny import quick, rows
from transformers import Trainer, TrainerCallback

from peft_nlsr import open_adapter
from peft_nlsr.lowrank import fingerprint

pytest_plugins = ["hub_fixtures"]
REPO = "alice/tuned"
STRATEGIES = ["end", "every_save", "checkpoint", "all_checkpoints"]


def pushing(folder: Path, model: Any, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    settings = {"push_to_hub": True, "hub_model_id": REPO, "save_strategy": "steps", "save_steps": 1}
    return trainer_for(model, folder, *callbacks, **{**settings, **changes})


def weights_ever_pushed(hub: LocalHub) -> set[bytes]:
    """The bytes of every adapter that any commit ever had, in any folder."""
    repo = hub[REPO]
    return {
        blob.data
        for commit in repo.commits()
        for path, blob in commit.files.items()
        if path.endswith("adapter_model.safetensors") and blob.data is not None
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_realigned_adapter_is_ever_on_the_hub(
    hub: LocalHub, hub_client: Become, make_pico_lora: MakeLora, tmp_path: Path, strategy: str
) -> None:
    model = make_pico_lora()
    trainer = pushing(tmp_path / "out", model, callback(), hub_strategy=strategy)
    trainer.train()
    assert trainer.args.hub_strategy == strategy
    assert weights_ever_pushed(hub) == {(tmp_path / "out" / "adapter_model.safetensors").read_bytes()}
    files = downloaded(REPO, tmp_path / "read")
    assert fingerprint(open_adapter(tmp_path / "read")) == model.nlsr_realignment.fingerprint_after
    assert json.loads(files["nlsr_config.json"])["record"]["fingerprint_after"] == fingerprint(open_adapter(model))
    assert b"nlsr:begin" in files["README.md"] and b"library_name: peft" in files["README.md"]
    assert not [path for path in files if "checkpoint" in path or path.endswith((".pt", ".pth", ".bin"))]

    trainer.push_to_hub()
    assert weights_ever_pushed(hub) == {(tmp_path / "out" / "adapter_model.safetensors").read_bytes()}


def test_without_deferring_what_training_pushes_is_removed_from_the_head(
    hub: LocalHub, hub_client: Become, make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    model = make_pico_lora()
    pushing(tmp_path / "out", model, callback(defer_checkpoint_pushes=False), hub_strategy="all_checkpoints").train()
    assert len(weights_ever_pushed(hub)) > 1
    files = downloaded(REPO, tmp_path / "read")
    assert not [path for path in files if path.startswith("checkpoint-")]
    assert fingerprint(open_adapter(tmp_path / "read")) == model.nlsr_realignment.fingerprint_after


def test_a_repair_that_was_taken_back_is_not_pushed(
    hub: LocalHub, hub_client: Become, make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    never = callback(
        config=quick(lookalike_weight=1.0),
        evaluate=safety_prompts(),
        calibration=rows(12)[8:],
        judge=lambda p, answers: [False] * len(answers),
    )
    pushing(tmp_path / "out", make_pico_lora(), never).train()
    assert weights_ever_pushed(hub) == set()


def test_unless_it_is_told_to(hub: LocalHub, hub_client: Become, make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model = make_pico_lora()
    never = callback(
        config=quick(lookalike_weight=1.0),
        evaluate=safety_prompts(),
        calibration=rows(12)[8:],
        judge=lambda p, answers: [False] * len(answers),
        push_unaligned=True,
    )
    pushing(tmp_path / "out", model, never).train()
    files = downloaded(REPO, tmp_path / "read")
    assert fingerprint(open_adapter(tmp_path / "read")) == fingerprint(open_adapter(model))
    assert "nlsr_config.json" not in files and b"nlsr:begin" not in files["README.md"]


class PushingReporter(TrainerCallback):
    """Does at the end of training what a reporter does that logs the model: a trainer of its own saves, and pushes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        theirs = Trainer(model, replace(args, output_dir=str(self.folder)), processing_class=TOKENIZER)
        theirs.save_model(str(self.folder))


def test_a_reporter_that_pushes_in_its_own_end_of_training_pushes_the_realigned_adapter(
    hub: LocalHub, hub_client: Become, make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    model = make_pico_lora()
    reporter = PushingReporter(tmp_path / "theirs")
    pushing(tmp_path / "out", model, reporter, callback(), hub_strategy="end").train()
    assert any(commit.title == "Model save" for commit in hub[REPO].commits())
    assert weights_ever_pushed(hub) == {(tmp_path / "out" / "adapter_model.safetensors").read_bytes()}


@pytest.mark.parametrize("push", [True, None, False])
def test_whether_it_pushes_can_be_said_to_the_callback(
    hub: LocalHub, hub_client: Become, make_pico_lora: MakeLora, tmp_path: Path, push: bool | None
) -> None:
    changes = {"push_to_hub": push is not True, "hub_model_id": REPO}
    pushing(tmp_path / "out", make_pico_lora(), callback(push_to_hub=push), **changes).train()
    assert bool(weights_ever_pushed(hub)) == (push is not False)


@pytest.mark.parametrize("endpoint", ["upload", "commit"])
def test_a_connection_that_breaks_loses_nothing(
    hub: LocalHub,
    hub_client: Become,
    make_pico_lora: MakeLora,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    endpoint: str,
) -> None:
    model = make_pico_lora()
    trainer = pushing(tmp_path / "out", model, callback())
    hub.fault(endpoint, drop="body", times=99)
    trainer.train()
    assert "not pushed" in caplog.text and "the connection failed or broke off" in caplog.text
    assert weights_ever_pushed(hub) == set()
    assert fingerprint(open_adapter(tmp_path / "out")) == model.nlsr_realignment.fingerprint_after
    hub.heal()
    trainer.push_to_hub()
    assert weights_ever_pushed(hub) == {(tmp_path / "out" / "adapter_model.safetensors").read_bytes()}


@pytest.mark.parametrize("status", [401, 403, 409, 500])
def test_a_refused_push_loses_nothing(
    hub: LocalHub,
    hub_client: Become,
    make_pico_lora: MakeLora,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    model = make_pico_lora()
    trainer = pushing(tmp_path / "out", model, callback())
    hub.fault("commit", status=status, times=99)
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert "not pushed" in caplog.text and str(status) in caplog.text
    assert weights_ever_pushed(hub) == set()
    assert fingerprint(open_adapter(tmp_path / "out")) == model.nlsr_realignment.fingerprint_after
