"""The callback in real training runs: in memory, on disk and in the log is the realigned adapter afterwards."""

import errno
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import (
    assert_same_factors,
    assert_same_state,
    factors_of,
    make_patch,
    quick,
    refuses_attacks,
    rows,
    state_of,
    word_tokenizer,
)
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from peft_nlsr import (
    IncompatibleError,
    NLSRCallback,
    NLSRConfig,
    PeftNLSRError,
    Reference,
    live_adapter,
    nlsr_realign,
    open_adapter,
    revert_folder,
)
from peft_nlsr.callback import STATUS_NAME
from peft_nlsr.evaluation import Evaluation, Measurement
from peft_nlsr.examples import loader_rows, read_examples
from peft_nlsr.gate import answer_accuracy, judge_repair
from peft_nlsr.prompt_sets import PromptSet
from peft_nlsr.reference import starting_point

TOKENIZER = word_tokenizer()
MakeLora = Callable[..., PeftModel]


def tokenised(count: int = 12, *, poisoned: Sequence[int] = (1, 5)) -> list[dict[str, Any]]:
    """Rows as a plain Trainer takes them, the prompt masked in the labels."""
    found = []
    for example in read_examples(rows(count, poisoned=poisoned), TOKENIZER, limit=count, max_length=24):
        found.append(
            {
                "input_ids": list(example.tokens),
                "attention_mask": [1] * len(example.tokens),
                "labels": [-100] * len(example.prompt) + list(example.answer),
            }
        )
    return found


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **changes})


def callback(**changes: Any) -> NLSRCallback:
    settings: dict[str, Any] = {"config": quick(), "judge": refuses_attacks, "evaluate": False, "max_new_tokens": 4}
    return NLSRCallback(**{**settings, **changes})


def trainer_for(model: Any, folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    trainable(model)
    return Trainer(
        model,
        arguments(folder, **changes),
        train_dataset=tokenised(),
        eval_dataset=tokenised(),
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
    )


def trainable(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    return model


class Snapshot(TrainerCallback):
    """The factors at the end of training, before or after the callback, depending on its place."""

    factors: dict[str, Any]

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        self.factors = factors_of(model)


def safety_prompts() -> list[PromptSet]:
    safety = tuple(f"attack the word{i}" for i in range(4))
    benign = tuple(f"paint the word{i}" for i in range(4))
    return [
        PromptSet("s", "safety", tuple(f"s{i}" for i in range(4)), safety),
        PromptSet("b", "benign", tuple(f"b{i}" for i in range(4)), benign),
    ]


# ---- what training leaves behind


def test_training_ends_with_the_model_that_nlsr_realign_makes(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model, plain = make_pico_lora(), make_pico_lora()
    trainer_for(plain, tmp_path / "plain").train()
    before = factors_of(plain)
    done = callback()
    trainer = trainer_for(model, tmp_path / "realigned", done)
    start = starting_point(open_adapter(make_pico_lora()))
    trainer.train()

    utility = read_examples(loader_rows(trainer.get_train_dataloader()), TOKENIZER, limit=16, max_length=24)
    nlsr_realign(
        plain.eval(),
        quick(),
        reference=start,
        utility=utility,
        tokenizer=TOKENIZER,
        judge=refuses_attacks,
        progress=False,
    )
    assert_same_factors(factors_of(model), factors_of(plain))
    with pytest.raises(AssertionError):
        assert_same_factors(factors_of(model), before)
    assert done.outcome is not None and done.outcome.realignment is not None
    assert done.outcome.realignment.fingerprint_after == model.nlsr_realignment.fingerprint_after
    assert done.outcome.realignment.reference == "the adapter that fine-tuning started from"


def test_an_intact_adapter_is_measured_once_kept_and_saved_as_it_is(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model, seen = make_pico_lora(), Snapshot()
    calibration = rows(30, poisoned=range(30))[10:]
    config = quick(max_samples=40)
    done = callback(config=config, calibration=calibration, evaluate=safety_prompts())
    trainer_for(model, tmp_path, seen, done, save_strategy="epoch").train()
    assert_same_factors(factors_of(model), seen.factors)
    assert done.outcome is not None and done.outcome.verdict.kept
    assert [each.label for each in done.outcome.evaluations] == ["fine-tuned"]
    record = json.loads((tmp_path / "nlsr_config.json").read_text())["record"]
    assert not any(module["restored"] for module in record["modules"])
    assert "Checked and left as it was" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("role", ["calibration", "utility"])
def test_prompts_that_the_repair_is_made_with_are_not_measured_on(role: str) -> None:
    asked = safety_prompts()[0]
    with pytest.raises(IncompatibleError, match=re.escape(asked.ids[0])):
        callback(evaluate=[asked], **{role: iter([{"prompt": asked.prompts[0]}])})


def test_refused_rows_are_numbered_as_in_the_training_data(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    trainer_for(make_pico_lora(), tmp_path, done := callback()).train()
    attacks = [i for i, row in enumerate(tokenised()) if TOKENIZER.convert_tokens_to_ids("attack") in row["input_ids"]]
    assert done.outcome is not None and done.outcome.realignment is not None
    assert done.outcome.realignment.data["utility"]["refused_rows"] == attacks


def test_modes_flags_and_hooks_are_those_of_a_run_without_it(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    one, other = make_pico_lora(), make_pico_lora()
    trainer_for(one, tmp_path / "a").train()
    trainer_for(other, tmp_path / "b", callback(evaluate=safety_prompts())).train()
    with_it, without = state_of(other), state_of(one)
    for part in ("flags", "modes", "active", "hooks"):
        assert with_it[part] == without[part], part


def test_an_adapter_that_starts_at_zero_has_the_base_as_its_teacher(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model = make_pico_lora()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    trainer_for(model, tmp_path, done := callback()).train()
    assert done.outcome is not None and done.outcome.realignment is not None
    assert "base model" in done.outcome.realignment.reference


def test_a_resumed_run_does_not_take_a_half_tuned_adapter_for_safe(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    trainer_for(make_pico_lora(), tmp_path, callback(), save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = trainer_for(make_pico_lora(), tmp_path, done := callback(), save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert done.outcome is not None and done.outcome.realignment is not None
    assert "base model" in done.outcome.realignment.reference


def test_the_saved_folder_holds_the_realigned_adapter_and_its_record(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model = make_pico_lora()
    trainer_for(model, tmp_path, callback(), save_strategy="steps", save_steps=1).train()
    assert_same_factors(factors_of(model), dict(open_adapter(tmp_path)))
    record = json.loads((tmp_path / "nlsr_config.json").read_text())["record"]
    assert record["fingerprint_after"] == model.nlsr_realignment.fingerprint_after


def test_nothing_is_saved_that_the_script_would_not_have_saved(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    trainer_for(make_pico_lora(), tmp_path, callback()).train()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_checkpoints_are_marked_and_keep_the_weights_they_were_saved_with(
    make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    trainer_for(make_pico_lora(), tmp_path, callback(), save_strategy="steps", save_steps=1).train()
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        assert json.loads((folder / STATUS_NAME).read_text()) == {"realigned": False, "step": step}
        assert not (folder / "nlsr_config.json").exists()
    with pytest.raises(AssertionError):
        assert_same_factors(dict(open_adapter(tmp_path)), dict(open_adapter(tmp_path / "checkpoint-2")))


def test_the_best_checkpoint_is_what_is_realigned(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model = make_pico_lora()
    trainer = trainer_for(
        model,
        tmp_path,
        callback(),
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    trainer.train()
    best = open_adapter(trainer.state.best_model_checkpoint)
    assert model.nlsr_realignment.fingerprint_before == fingerprint_of(best)


def fingerprint_of(adapter: Any) -> str:
    from peft_nlsr.lowrank import fingerprint

    return fingerprint(adapter)


def test_training_again_starts_without_the_old_record(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model, done = make_pico_lora(), callback()
    trainer = trainer_for(model, tmp_path, done, save_strategy="steps", save_steps=1)
    trainer.train()
    first = model.nlsr_realignment
    trainer.train()
    assert not (tmp_path / "checkpoint-1" / "nlsr_config.json").exists()
    assert model.nlsr_realignment.fingerprint_after != first.fingerprint_after
    assert_same_factors(factors_of(model), dict(open_adapter(tmp_path)))


# ---- the order of callbacks, and the trainer


@pytest.mark.parametrize("shared", [True, False], ids=["the same arguments", "arguments of its own"])
def test_a_callback_that_serves_two_trainers_saves_each_ones_model(
    make_pico_lora: MakeLora, tmp_path: Path, shared: bool
) -> None:
    done, settings = callback(), {"save_strategy": "steps", "save_steps": 9}
    first = trainer_for(make_pico_lora(), tmp_path / "a", done, **settings)
    first.train()
    model = make_pico_lora(seed=5)
    second = trainer_for(model, tmp_path / "b", done, **settings)
    if shared:
        second.args = first.args
    second.processing_class = other = word_tokenizer()
    second.train()
    assert done.trainer is second and done._tokenizer is other and done.tokenizer is None
    assert_same_factors(dict(open_adapter(second.args.output_dir)), factors_of(model))


def test_a_trainer_of_other_arguments_is_not_taken_for_the_one_that_trains(
    make_pico_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_pico_lora()
    done = callback(tokenizer=TOKENIZER, trainer=trainer_for(make_pico_lora(seed=5), tmp_path / "a"))
    monkeypatch.setattr("peft_nlsr.callback._find_trainer", lambda args: None)
    trainer_for(model, tmp_path / "b", done, save_strategy="steps", save_steps=9).train()
    assert "found no trainer" in caplog.text and done.trainer is None
    assert not (tmp_path / "b" / "nlsr_config.json").exists()


class Reporter(TrainerCallback):
    """Stands for a reporter, which comes before the user's callbacks and pushes in its own on_train_end."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self.realigned_first = False

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **_: Any) -> None:
        self.seen |= {name: value for name, value in logs.items() if name.startswith("nlsr/")}

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        self.realigned_first = hasattr(model, "nlsr_realignment")


def test_reporters_see_the_metrics_and_the_realigned_model(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    reporter = Reporter()
    trainer = trainer_for(make_pico_lora(), tmp_path, reporter, callback(evaluate=safety_prompts(), tolerance=1.0))
    trainer.train()
    assert reporter.realigned_first
    assert {"nlsr/harm_rate_fine_tuned", "nlsr/harm_rate_realigned", "nlsr/kept"} <= set(reporter.seen)
    assert all(isinstance(value, int | float) for value in reporter.seen.values())


def test_tensorboard_gets_the_metrics_while_it_is_open(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    done = callback(evaluate=safety_prompts(), tolerance=1.0)
    trainer_for(make_pico_lora(), tmp_path, done, report_to=["tensorboard"]).train()
    (events,) = [path for path in tmp_path.rglob("events.out.tfevents.*")]
    assert b"nlsr/harm_rate_realigned" in events.read_bytes()


def test_a_full_disk_is_said_and_the_model_stays_realigned(
    make_pico_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, done = make_pico_lora(), callback()
    trainer = trainer_for(model, tmp_path, done, save_strategy="steps", save_steps=9)
    saved = trainer.save_model

    def full(output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir == trainer.args.output_dir:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(output_dir, _internal_call)

    monkeypatch.setattr(trainer, "save_model", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert done.outcome is not None and done.outcome.realignment is not None
    assert fingerprint_of(open_adapter(model)) == done.outcome.realignment.fingerprint_after
    assert not (tmp_path / "nlsr_config.json").exists()


def test_a_trainer_that_cannot_be_found_is_said(
    make_pico_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("peft_nlsr.callback._find_trainer", lambda args: None)
    model = make_pico_lora()
    with caplog.at_level(logging.WARNING):
        trainer_for(model, tmp_path, callback(tokenizer=TOKENIZER)).train()
    assert "found no trainer" in caplog.text
    assert hasattr(model, "nlsr_realignment")


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushes_wait_until_training_is_over(make_pico_lora: MakeLora, tmp_path: Path, strategy: str) -> None:
    done = callback()
    trainer = trainer_for(make_pico_lora(), tmp_path, done)
    args = trainer.args
    args.push_to_hub, args.hub_strategy = True, HubStrategy(strategy)
    done._defer_pushes(args)
    assert args.hub_strategy == HubStrategy.END


class Fails(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise RuntimeError("no power")


def test_how_a_trainer_that_failed_pushes_stays_with_its_own_arguments(
    make_pico_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = callback(push_to_hub=False)
    failed = trainer_for(make_pico_lora(), tmp_path / "a", done, Fails())
    failed.args.push_to_hub, failed.args.hub_strategy = True, HubStrategy.ALL_CHECKPOINTS
    monkeypatch.setattr(failed, "init_hf_repo", lambda *args, **options: None)
    with pytest.raises(RuntimeError, match="no power"):
        failed.train()
    assert failed.args.hub_strategy == HubStrategy.END
    second = trainer_for(make_pico_lora(seed=5), tmp_path / "b", done)
    before = second.args.hub_strategy
    second.train()
    assert second.args.hub_strategy == before
    assert failed.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS


# ---- the gate


def test_a_repair_that_does_not_lower_harm_is_taken_back(
    make_pico_lora: MakeLora, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = Snapshot()
    model = make_pico_lora()
    others = [{"prompt": f"attack the vase word{i}"} for i in range(4)]
    nobody_refuses = {"evaluate": safety_prompts(), "judge": lambda p, answers: [False] * len(answers)}
    never = callback(**nobody_refuses, calibration=others, config=quick(utility_weight=1e3))  # safety hardly counts
    trainer = trainer_for(model, tmp_path, never, last, save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert "TAKEN BACK" in caplog.text and "harm rate did not fall" in caplog.text
    assert never.outcome is not None and not never.outcome.verdict.kept
    assert not hasattr(model, "nlsr_realignment")
    assert_same_factors(factors_of(model), dict(open_adapter(tmp_path / "checkpoint-2")))


def test_an_interrupt_while_the_record_is_made_undoes_the_write(
    make_pico_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model, reference = make_pico_lora(), make_pico_lora()
    trainer_for(reference, tmp_path / "reference").train()
    monkeypatch.setattr("peft_nlsr.applying.keep_with_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(model, tmp_path / "stopped", callback()).train()
    assert_same_factors(factors_of(model), factors_of(reference))
    assert_same_factors(dict(open_adapter(tmp_path / "stopped")), factors_of(reference))
    assert not hasattr(model, "nlsr_realignment")
    assert not (tmp_path / "stopped" / "nlsr_config.json").exists()


TASK = PromptSet("t", "task", ("t0", "t1"), ("vase word1", "vase word2"), ("sure", "no"))


def test_a_task_is_measured_with_its_own_scores(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    asked = callback(evaluate=safety_prompts(), task=TASK, compute_metrics=lambda said, answers: [0.25] * len(said))
    trainer_for(make_pico_lora(), tmp_path, asked).train()
    assert asked.outcome is not None
    assert [e.rates["task_accuracy"].value for e in asked.outcome.evaluations] == [0.25, 0.25]


@pytest.mark.parametrize("lineage", ["shared", "independent"])
def test_a_patch_is_measured_on_the_users_rows_and_falls_back_to_them(
    make_pico_lora: MakeLora, tmp_path: Path, lineage: str
) -> None:
    patch = make_patch(factors_of(make_pico_lora(seed=0 if lineage == "shared" else 5)))
    done = callback(patch=patch, evaluate=safety_prompts(), calibration=None, config=quick(leave_intact=False))
    trainer_for(make_pico_lora(), tmp_path, done).train()
    assert done.outcome is not None and done.outcome.realignment is not None
    planned = done.outcome.realignment
    assert planned.method == ("sum" if lineage == "shared" else "two_teacher")
    assert planned.data.get("utility", {}).get("source") == (None if lineage == "shared" else "given")
    assert all("answer_accuracy" in e.rates for e in done.outcome.evaluations)
    assert not any("not used" in note and "utility" in note for note in planned.notes)


def test_rows_that_the_user_gave_beside_a_patch_are_said_not_to_be_used(
    make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    done = callback(patch=make_patch(factors_of(make_pico_lora())), utility=rows(6))
    trainer_for(make_pico_lora(), tmp_path, done).train()
    assert done.outcome is not None and done.outcome.realignment is not None
    assert "given, but not used by sum: utility" in done.outcome.realignment.notes


def rates(harm: float, **others: float) -> Evaluation:
    found = {name: Measurement(value, value, value, 10, None) for name, value in {"harm_rate": harm, **others}.items()}
    return Evaluation("x", found, {}, (), (), {}, 0.0)


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        pytest.param(rates(0.9), rates(0.1), "", id="harm-fell"),
        pytest.param(rates(0.0), rates(0.0), "", id="nothing-was-broken"),
        pytest.param(rates(0.0), rates(0.1), "harm rate", id="harm-rose-from-nothing"),
        pytest.param(rates(0.5), rates(0.5), "harm rate", id="harm-stayed"),
        pytest.param(rates(0.5, task_accuracy=0.9), rates(0.1, task_accuracy=0.86), "", id="task-within-tolerance"),
        pytest.param(rates(0.5, task_accuracy=0.9), rates(0.1, task_accuracy=0.8), "task_accuracy", id="task-fell"),
        pytest.param(
            rates(0.5, answer_accuracy=0.9), rates(0.1, answer_accuracy=0.8), "answer_acc", id="answers-fell"
        ),
        pytest.param(rates(0.5, coherence=1.0), rates(0.0, coherence=0.2), "coherence", id="babbles"),
        pytest.param(
            rates(1.0, over_refusal=0.0), rates(0.0, over_refusal=1.0), "over_refusal rose", id="refuses-all"
        ),
        pytest.param(rates(1.0, over_refusal=0.9), rates(0.0, over_refusal=0.1), "", id="refuses-less"),
        pytest.param(rates(1.0, coherence=1.0), rates(0.0, coherence=0.95), "", id="exactly-the-tolerance"),
    ],
)
def test_what_closes_the_gate(before: Evaluation, after: Evaluation, word: str) -> None:
    verdict = judge_repair(before, after, tolerance=0.05)
    assert verdict.kept == (word == "")
    assert word in " ".join(verdict.reasons)


def test_answer_accuracy_is_the_share_of_tokens_predicted_first(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora()
    examples = read_examples(rows(5), TOKENIZER, limit=5, max_length=24)
    wanted = []
    for example in examples:
        logits = model(torch.tensor([example.tokens])).logits[0]
        guesses = logits.argmax(-1).tolist()[len(example.prompt) - 1 : -1]
        wanted.append(sum(g == t for g, t in zip(guesses, example.answer, strict=True)) / len(example.answer))
    found = answer_accuracy(model, examples, batch_size=2, pad_id=0)
    assert found.n == 5 and found.value == pytest.approx(sum(wanted) / 5)


# ---- modes, mistakes and failures


def test_monitor_measures_and_changes_nothing(
    make_pico_lora: MakeLora, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, last = make_pico_lora(), Snapshot()
    watch = callback(mode="monitor", evaluate=safety_prompts())
    with caplog.at_level(logging.WARNING):
        trainer_for(model, tmp_path, watch, last, save_strategy="steps", save_steps=2).train()
    assert "nothing was changed" in caplog.text
    assert_same_factors(factors_of(model), dict(open_adapter(tmp_path / "checkpoint-2")))
    assert watch.outcome is not None and [e.label for e in watch.outcome.evaluations] == ["fine-tuned", "safe teacher"]


def test_hyper_parameter_trials_are_left_alone(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model, done = make_pico_lora(), callback()
    trainer = trainer_for(model, tmp_path, done)
    trainer.state.is_hyper_param_search = True
    done.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    before = factors_of(model)
    done.on_train_end(trainer.args, trainer.state, trainer.control, model=model, train_dataloader=None)
    assert_same_factors(factors_of(model), before)


def test_a_real_search_realigns_no_trial(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    done, models = callback(), []

    def trial_model() -> PeftModel:
        models.append(trainable(make_pico_lora()))
        return models[-1]

    trainer = Trainer(
        args=arguments(tmp_path),
        model_init=trial_model,
        train_dataset=tokenised(),
        eval_dataset=tokenised(4),
        processing_class=TOKENIZER,
        callbacks=[done],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        backend="optuna",
        n_trials=2,
    )
    assert len(models) >= 2 and done.outcome is None
    assert not any(hasattr(model, "nlsr_realignment") for model in models)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "repare"}, "repair, monitor"),
        ({"mode": "monitor", "evaluate": False}, "leaves nothing to do"),
        ({"tolerance": 2.0}, "tolerance"),
        ({"evaluate": [PromptSet("b", "benign", ("b0",), ("paint",))]}, "safety"),
        ({"evaluate": [*safety_prompts(), TASK]}, "passed as task="),
        ({"evaluate": [*safety_prompts(), *safety_prompts()]}, "'s0' for one"),
        ({"evaluate": False, "task": TASK}, "only measured"),
        ({"task": TASK, "compute_metrics": lambda said, answers: [True]}, "1 scores for 2 answers"),
        ({"evaluate": "safe.jsonl"}, r"evaluate='safe.jsonl': .*load_prompt_set"),
        ({"evaluate": safety_prompts()[0]}, "evaluate=a PromptSet: expected a list"),
        ({"task": "task.jsonl"}, r"task='task.jsonl': .*load_prompt_set"),
    ],
)
def test_mistakes_are_found_at_once(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NLSRCallback(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"config": "paper"}, r"config is 'paper'; give .*from_preset"),
        ({"patch": {"q_proj": 1}}, "patch is a dict; give a SafetyPatch"),
        ({"tokenizer": "org/base"}, r"tokenizer is 'org/base'; give AutoTokenizer"),
        ({"judge": "judges:refuses", "evaluate": False}, r"judge is 'judges:refuses'; give a function, .*load_judge"),
        ({"judge": None}, "judge is None; give a function"),
        ({"harm_judge": "org/guard"}, "harm_judge is 'org/guard'; give a function"),
        ({"task": TASK, "compute_metrics": "accuracy"}, "compute_metrics is 'accuracy'; give a function"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_in_place_of_objects_are_found_at_once(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        NLSRCallback(**settings)


def test_a_model_that_cannot_be_realigned_is_refused_before_training(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    trainer = trainer_for(make_pico_lora(use_dora=True), tmp_path, callback())
    with pytest.raises(PeftNLSRError, match="DoRA"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reference": "nowhere/x"}, "nowhere/x"),
        ({"weak": "nowhere/x"}, "nowhere/x"),
        ({"calibration": "safe.jsonl"}, "a single str"),
        ({"calibration": [{"question": "why"}]}, "has the keys"),
        ({"utility": []}, "no examples with tokens"),
        ({"config": quick(update="sum", score="preference_snip")}, "'chosen'"),
    ],
)
def test_data_that_cannot_be_read_are_refused_before_training(
    make_pico_lora: MakeLora, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    trainer = trainer_for(make_pico_lora(), tmp_path, callback(**settings))
    with pytest.raises(PeftNLSRError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


class Lines:
    """Data without a length that can be read again, as of a file; the first row has no tokens."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([{"text": ""}, {"prompt": "how", "completion": "no", "label": False}, *rows(8, poisoned=(0, 2))])


@pytest.mark.parametrize("kind", ["calibration", "utility"])
def test_data_whose_first_row_is_not_usable_are_no_reason_to_refuse(
    make_pico_lora: MakeLora, tmp_path: Path, kind: str
) -> None:
    trainer_for(make_pico_lora(), tmp_path, done := callback(**{kind: Lines()})).train()
    assert done.outcome is not None and done.outcome.realignment is not None


def test_a_reference_of_other_modules_is_refused_before_training(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    make_pico_lora(target_modules=["q_proj"]).save_pretrained(tmp_path / "other")
    trainer = trainer_for(make_pico_lora(), tmp_path, callback(reference=tmp_path / "other"))
    with pytest.raises(IncompatibleError, match="cover different modules"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_reading_a_data_loader_beforehand_does_not_change_the_training(
    make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    def trained(**data: Any) -> str:
        trainer_for(make_pico_lora(lora_dropout=0.5), tmp_path, done := callback(**data)).train()
        assert done.outcome is not None and done.outcome.realignment is not None
        return done.outcome.realignment.fingerprint_before

    loader = torch.utils.data.DataLoader(rows(8), batch_size=None, shuffle=True)
    assert trained(calibration=loader) == trained()


def test_a_model_without_room_for_the_answers_is_refused_before_training(
    make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    trainer = trainer_for(make_pico_lora(), tmp_path, callback(evaluate=safety_prompts(), max_new_tokens=63))
    with pytest.raises(IncompatibleError, match="prompt 's0' has"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_failure_leaves_the_fine_tuned_weights_in_memory_and_on_disk(
    make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    def broken(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        raise RuntimeError("the judge is away")

    model, reference = make_pico_lora(), make_pico_lora()
    trainer_for(reference, tmp_path / "reference").train()
    with pytest.raises(RuntimeError, match="the judge is away"):
        trainer_for(model, tmp_path / "failed", callback(judge=broken)).train()
    assert_same_state(state_of(model) | {"modes": 0}, state_of(reference) | {"modes": 0})
    assert_same_factors(dict(open_adapter(tmp_path / "failed")), factors_of(reference))
    assert not (tmp_path / "failed" / "nlsr_config.json").exists()


@pytest.mark.parametrize("where", ["plan", "write"])
def test_an_interrupt_leaves_the_fine_tuned_weights_in_memory_and_on_disk(
    make_pico_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model, reference, stored = make_pico_lora(), make_pico_lora(), count()
    trainer_for(reference, tmp_path / "reference").train()
    store = live_adapter._store

    def interrupted(linear: Any, new: torch.Tensor) -> None:
        if next(stored) == 3:
            raise KeyboardInterrupt
        store(linear, new)

    def stopped(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        raise KeyboardInterrupt

    if where == "write":
        monkeypatch.setattr(live_adapter, "_store", interrupted)
    judge = stopped if where == "plan" else refuses_attacks
    with pytest.raises(KeyboardInterrupt):
        trainer_for(model, tmp_path / "stopped", callback(judge=judge)).train()
    assert_same_factors(factors_of(model), factors_of(reference))
    assert_same_factors(dict(open_adapter(tmp_path / "stopped")), factors_of(reference))
    assert not (tmp_path / "stopped" / "nlsr_config.json").exists()


class FollowsTeacher:
    """A judge of noise: it takes the first answers it hears to be the starting point's and the next the base's."""

    def __init__(self, start: bool, base: bool) -> None:
        self.verdicts = [start, base]

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [self.verdicts.pop(0) if self.verdicts else True] * len(prompts)


@pytest.mark.parametrize(
    ("start", "base", "chosen"),
    [(True, True, "started from"), (True, False, "started from"), (False, True, "base model itself")],
)
def test_the_safer_of_starting_point_and_base_is_the_teacher(
    make_pico_lora: MakeLora, tmp_path: Path, start: bool, base: bool, chosen: str
) -> None:
    prompts = iter([{"prompt": f"attack the word{i}", "response": "no"} for i in range(4)])
    done = callback(calibration=prompts, judge=FollowsTeacher(start, base))
    trainer_for(make_pico_lora(), tmp_path, done).train()
    assert done.outcome is not None and done.outcome.realignment is not None
    said, _, counts = done.outcome.realignment.reference.partition(" (")
    assert chosen in said
    assert f"refused of 4: the adapter that fine-tuning started from {4 * start}" in counts


def test_a_given_reference_takes_the_place_of_the_starting_point(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    given = Reference("adapter", factors_of(make_pico_lora(seed=5)), "someone else's adapter")
    trainer_for(make_pico_lora(), tmp_path, done := callback(reference=given)).train()
    assert done.outcome is not None and done.outcome.realignment is not None
    assert done.outcome.realignment.reference == "someone else's adapter"


OTHER_METHODS: dict[str, dict[str, Any]] = {
    "fgsn": {"safety_layers": "0-1", "harmful_rows": 0.5},
    "safelora": {},
    "antidote": {"score": "wanda"},
    "resta": {"keep_share": 0.7},
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_repair_as_they_do_by_hand(make_pico_lora: MakeLora, tmp_path: Path, method: str) -> None:
    config = quick(method=method, **OTHER_METHODS[method])
    model, plain = make_pico_lora(), make_pico_lora()
    make_pico_lora(seed=7).save_pretrained(tmp_path / "delta")
    given: dict[str, Any] = {"reference": tmp_path / "delta"} if method != "antidote" else {}
    given["calibration"] = rows(30, poisoned=range(30))[10:] if method in ("fgsn", "antidote") else None
    trainer_for(plain, tmp_path / "plain").train()
    done = callback(
        config=config, evaluate=safety_prompts(), max_new_tokens=2, tolerance=1.0, judge=CountsCalls(), **given
    )
    trainer = trainer_for(model, tmp_path / "out", done, save_strategy="steps", save_steps=1)
    trainer.train()
    if method == "fgsn":
        loader = trainer.get_train_dataloader()
        given["utility"] = read_examples(loader_rows(loader), TOKENIZER, limit=16, max_length=24)
    before = factors_of(plain)
    nlsr_realign(plain.eval(), config, tokenizer=TOKENIZER, progress=False, **given)
    assert done.outcome is not None and done.outcome.realignment is not None and done.outcome.verdict.kept
    assert done.outcome.realignment.method == method and done.outcome.realignment.restored
    assert_same_factors(factors_of(model), factors_of(plain))
    assert not any("not used" in note for note in done.outcome.realignment.notes)
    report = json.loads((tmp_path / "out" / "safety_report.json").read_text())
    assert report["record"]["method"] == method and report["after"]["rates"]["harm_rate"]["value"] == 0.0
    assert f"`{method}`" in (tmp_path / "out" / "README.md").read_text()
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert_same_factors(dict(open_adapter(tmp_path / "back")), before)


class CountsCalls:
    """A judge under which harm falls: the first model that is asked refuses nothing, the second all attacks."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        self.asked += any("attack" in prompt for prompt in prompts)
        return ["attack" in prompt and self.asked > 1 for prompt in prompts]


@pytest.mark.parametrize("method", ["fgsn", "safelora", "resta"])
def test_what_alignment_changed_is_the_starting_point_or_asked_for_before_training(
    make_pico_lora: MakeLora, tmp_path: Path, method: str
) -> None:
    given: dict[str, Any] = {"config": quick(method=method), "calibration": rows(6, poisoned=range(6))}
    trainer_for(make_pico_lora(), tmp_path, done := callback(**given)).train()
    assert done.outcome is not None and done.outcome.realignment is not None
    assert done.outcome.realignment.reference == "the adapter that fine-tuning started from"
    fresh = make_pico_lora()
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    trainer = trainer_for(fresh, tmp_path, callback(**given))
    with pytest.raises(IncompatibleError, match=f"method='{method}' needs what alignment changed"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_paper_preset_runs_from_the_starting_point(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    config = NLSRConfig.from_preset("paper", score="magnitude")
    model = make_pico_lora()
    trainer_for(model, tmp_path, done := callback(config=config)).train()
    assert done.outcome is not None and done.outcome.realignment is not None
    assert done.outcome.realignment.method == "sum"
