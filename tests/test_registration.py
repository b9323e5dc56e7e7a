"""Whatever is written beside weights is true of them: the claim follows the realigned values, and only them."""

import copy
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from test_card import a_report
from tiny import assert_same_factors, assert_same_tensors, drift, factors_of, hashes, make_patch
from transformers import LlamaForCausalLM

import peft_nlsr
from peft_nlsr import (
    LineageError,
    NLSRConfig,
    PeftNLSRError,
    Realignment,
    SafetyPatch,
    nlsr_realign,
    open_adapter,
    plan,
    realign_folder,
    revert,
    revert_folder,
)
from peft_nlsr.card import TAGS
from peft_nlsr.lowrank import fingerprint
from peft_nlsr.plots import save_plots
from peft_nlsr.record import DIFF_NAME
from peft_nlsr.registration import NLSRLoraConfig, forget, keep_with_adapter, register, unregister, wrap_trainer
from peft_nlsr.report import REPORT_NAME, SafetyReport

MakeLora = Callable[..., PeftModel]
RECORD, README, CONFIG, WEIGHTS = "nlsr_config.json", "README.md", "adapter_config.json", "adapter_model.safetensors"
BEGIN = "<!-- nlsr:begin -->"
HOOKS = ("create_or_update_model_card", "push_to_hub", "save_pretrained")


@pytest.fixture
def patch(make_pico_lora: MakeLora) -> SafetyPatch:
    return make_patch(factors_of(make_pico_lora(seed=0)))


@pytest.fixture
def tuned(make_pico_lora: MakeLora) -> PeftModel:
    """An adapter that was trained on from the reference."""
    return drift(make_pico_lora(seed=0))


@pytest.fixture
def model(tuned: PeftModel, patch: SafetyPatch) -> PeftModel:
    """The same, realigned."""
    return nlsr_realign(tuned, patch=patch)


def record_in(folder: Path) -> dict[str, Any] | None:
    return json.loads((folder / RECORD).read_text())["record"] if (folder / RECORD).exists() else None


def assert_claims(folder: Path, readme: Path | None = None) -> None:
    """The folder claims a realignment, and the claim is true."""
    record = record_in(folder)
    assert record is not None and record["fingerprint_after"] == fingerprint(open_adapter(folder))
    text = (readme or folder / README).read_text()
    data = ModelCard(text).data
    assert "nlsr:begin" in text and set(TAGS) <= set(data.tags) and data.library_name == "peft"
    assert record["fingerprint_after"] in text


def assert_no_claim(folder: Path) -> None:
    files = {path.name for path in folder.iterdir()}
    assert (record_in(folder) if RECORD in files and "record" in (folder / RECORD).read_text() else None) is None
    assert not files & {REPORT_NAME, DIFF_NAME}
    if README in files:
        text = (folder / README).read_text()
        assert "nlsr" not in text and "safety-realigned" not in text


def train_on(model: Any) -> None:
    """One step of further training, as far as the weights are concerned."""
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.add_(1e-3)


def report_of(done: Realignment) -> SafetyReport:
    return a_report(done.to_dict())


# ---- saving


@pytest.mark.parametrize("method", ["sum", "swap", "sum-exact"])
def test_a_saved_adapter_has_its_record_card_and_undo(
    tmp_path: Path, tuned: PeftModel, patch: SafetyPatch, method: str
) -> None:
    tuned.save_pretrained(tmp_path / "before")
    config = NLSRConfig(update=method.split("-")[0], compress=method != "sum-exact")
    model = nlsr_realign(tuned, config, patch=patch)
    model.save_pretrained(tmp_path / "after")
    assert_claims(tmp_path / "after")
    content = json.loads((tmp_path / "after" / RECORD).read_text())
    assert content == {"config": config.to_dict(), "record": model.nlsr_realignment.to_dict()}
    assert NLSRConfig.from_pretrained(tmp_path / "after") == config
    revert_folder(tmp_path / "after", tmp_path / "back")
    assert_no_claim(tmp_path / "back")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "before" / name).read_bytes(), name


def test_the_configuration_of_peft_stays_what_it_was(tmp_path: Path, tuned: PeftModel, patch: SafetyPatch) -> None:
    tuned.save_pretrained(tmp_path / "before")
    nlsr_realign(tuned, patch=patch).save_pretrained(tmp_path / "after")
    assert (tmp_path / "before" / CONFIG).read_bytes() == (tmp_path / "after" / CONFIG).read_bytes()
    assert set(load_file(tmp_path / "before" / WEIGHTS)) == set(load_file(tmp_path / "after" / WEIGHTS))


def test_the_report_is_saved_and_fills_the_card(tmp_path: Path, model: PeftModel) -> None:
    done = model.nlsr_realignment
    report = report_of(done)
    keep_with_adapter(model, done, report)
    model.save_pretrained(tmp_path)
    assert SafetyReport.load(tmp_path) == report
    assert "2 of 50" in (tmp_path / README).read_text() and ModelCard.load(tmp_path / README).data.eval_results
    keep_with_adapter(model, done)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / REPORT_NAME).exists() and "**Not measured.**" in (tmp_path / README).read_text()


def test_a_plan_and_a_report_of_other_weights_are_refused(tuned: PeftModel, patch: SafetyPatch) -> None:
    planned = plan(tuned, patch=patch)
    with pytest.raises(ValueError, match="only planned"):
        keep_with_adapter(tuned, planned)
    done = nlsr_realign(tuned, patch=patch).nlsr_realignment
    with pytest.raises(ValueError, match=r"the report speaks of weights aaaa.*give the report of this realignment"):
        keep_with_adapter(tuned, done, a_report())


def test_saving_twice_changes_nothing(tmp_path: Path, model: PeftModel) -> None:
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    once = hashes(tmp_path)
    model.save_pretrained(tmp_path)
    assert hashes(tmp_path) == once


def test_no_path_of_this_machine_is_written(tmp_path: Path, model: PeftModel) -> None:
    base = tmp_path / "base"
    base.mkdir()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.get_base_model().config._name_or_path = str(base)
    model.save_pretrained(tmp_path / "out")
    assert_claims(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.name != CONFIG:  # PEFT's own file, which it needs to find the base model again
            assert str(tmp_path).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("live", [True, False], ids=["model", "folder"])
@pytest.mark.parametrize("compress", [True, False], ids=["compressed", "grown"])
def test_no_path_of_this_machine_is_written_and_the_undo_still_has_it(
    tmp_path: Path, tuned: PeftModel, patch: SafetyPatch, compress: bool, live: bool
) -> None:
    base = tmp_path / 'a "base" of José'
    base.mkdir()
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(tmp_path / "in")
    config = NLSRConfig(update="sum", compress=compress)
    if live:
        nlsr_realign(tuned, config, patch=patch).save_pretrained(tmp_path / "out")
    else:
        patch.save_pretrained(tmp_path / "patch")
        realign_folder(tmp_path / "in", tmp_path / "out", patch=tmp_path / "patch", config=config)
    for path in (tmp_path / "out").iterdir():
        if path.name != CONFIG:
            assert str(tmp_path).encode() not in path.read_bytes(), path.name
    revert_folder(tmp_path / "out", tmp_path / "back")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name


@pytest.mark.parametrize("method", ["safelora", "resta"])
def test_no_path_of_a_reference_is_written(
    tmp_path: Path, tuned: PeftModel, make_pico_lora: MakeLora, method: str
) -> None:
    make_pico_lora(seed=0).save_pretrained(tmp_path / "aligned")
    tuned.save_pretrained(tmp_path / "in")
    config = NLSRConfig(method=method)
    realign_folder(tmp_path / "in", tmp_path / "out", reference=str(tmp_path / "aligned"), config=config)
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_pictures_beside_the_card_are_shown(tmp_path: Path, model: PeftModel) -> None:
    (tmp_path / "change_norms.png").write_bytes(b"")
    model.save_pretrained(tmp_path)
    assert "](change_norms.png)" in (tmp_path / README).read_text()


# ---- when the weights are others


def test_training_on_withdraws_the_claim_from_the_folder(
    tmp_path: Path, model: PeftModel, caplog: pytest.LogCaptureFixture
) -> None:
    keep_with_adapter(model, model.nlsr_realignment, report_of(model.nlsr_realignment))
    model.save_pretrained(tmp_path)
    text = (tmp_path / README).read_text()
    (tmp_path / README).write_text(text.replace("# Model Card for Model ID", "# Mine"))
    train_on(model)
    with caplog.at_level(logging.WARNING, "peft_nlsr"):
        model.save_pretrained(tmp_path)
    assert_no_claim(tmp_path)
    assert "its weights are not the realigned ones" in caplog.text and "# Mine" in (tmp_path / README).read_text()
    assert NLSRConfig.from_pretrained(tmp_path) == model.nlsr_realignment.config


def test_pictures_of_other_weights_do_not_stay(tmp_path: Path, model: PeftModel) -> None:
    report = report_of(model.nlsr_realignment)
    keep_with_adapter(model, model.nlsr_realignment, report)
    drawn = set(save_plots(report, tmp_path))
    (tmp_path / "mine.svg").write_bytes(b"")
    model.save_pretrained(tmp_path)
    assert drawn <= {path.name for path in tmp_path.iterdir()}
    train_on(model)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".svg")] == ["mine.svg"]


def test_a_claim_about_saved_weights_survives_nothing_else(tmp_path: Path, model: PeftModel) -> None:
    model.save_pretrained(tmp_path)
    train_on(model)
    model.create_or_update_model_card(str(tmp_path))
    assert_claims(tmp_path)  # the weights in the folder are still the realigned ones
    tensors = load_file(tmp_path / WEIGHTS)
    next(iter(tensors.values())).add_(1e-3)
    save_file(tensors, tmp_path / WEIGHTS)
    model.create_or_update_model_card(str(tmp_path))
    assert BEGIN not in (tmp_path / README).read_text()


def test_a_configuration_saved_before_any_weights_is_no_error(
    tmp_path: Path, model: PeftModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "peft_nlsr"):
        model.peft_config["default"].save_pretrained(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG} and not caplog.text
    model.save_pretrained(tmp_path)
    assert_claims(tmp_path)


def test_weights_that_cannot_be_read_carry_no_claim(
    tmp_path: Path, model: PeftModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"not safetensors")
    with caplog.at_level(logging.WARNING, "peft_nlsr"):
        model.peft_config["default"].save_pretrained(str(tmp_path))
    assert_no_claim(tmp_path)
    assert "is not a safetensors file" in caplog.text


def test_revert_withdraws_the_claim_and_restores_the_methods(tmp_path: Path, model: PeftModel) -> None:
    model.save_pretrained(tmp_path)
    assert set(HOOKS) & set(vars(model))
    revert(model)
    assert not set(HOOKS) & set(vars(model))
    model.save_pretrained(tmp_path)
    assert_no_claim(tmp_path)


def test_a_saved_claim_that_still_holds_is_left_alone_by_an_adapter_without_one(
    tmp_path: Path, model: PeftModel
) -> None:
    model.save_pretrained(tmp_path)
    forget(model, "default")
    model.save_pretrained(tmp_path)
    assert_claims(tmp_path)


@pytest.mark.parametrize("broken", ["---\ntags: [\n---\n", f"{BEGIN}\n"], ids=["yaml", "half-marker"])
def test_a_broken_card_is_left_alone_with_a_warning(
    tmp_path: Path, make_pico_lora: MakeLora, patch: SafetyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    drift(make_pico_lora(seed=0)).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / README).write_text(broken)
    with caplog.at_level(logging.WARNING, "peft_nlsr"):
        done = realign_folder(tmp_path / "in", tmp_path / "out", patch=patch)
    assert "left as it is, without the safety section" in caplog.text
    assert (tmp_path / "out" / README).read_text() == broken and record_in(tmp_path / "out") == done.to_dict()
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "in")


# ---- the same values in another dtype


@pytest.mark.parametrize("method", ["sum", "sum-exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_save_in_fewer_bits_is_recognised(
    tmp_path: Path, tuned: PeftModel, patch: SafetyPatch, dtype: torch.dtype, method: str
) -> None:
    def state(model: PeftModel) -> dict[str, Any]:
        return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}

    tuned.save_pretrained(tmp_path / "before", state_dict=state(tuned))
    model = nlsr_realign(tuned, NLSRConfig(update="sum", compress=method == "sum"), patch=patch)
    keep_with_adapter(model, model.nlsr_realignment, report_of(model.nlsr_realignment))
    model.save_pretrained(tmp_path / "after", state_dict=state(model))
    assert_claims(tmp_path / "after")
    assert SafetyReport.load(tmp_path / "after").record == record_in(tmp_path / "after")
    revert_folder(tmp_path / "after", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "before" / WEIGHTS).read_bytes()


def test_other_values_in_fewer_bits_are_not(tmp_path: Path, model: PeftModel) -> None:
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] += 0.1
    model.save_pretrained(tmp_path, state_dict={n: t.bfloat16() for n, t in model.state_dict().items()})
    assert_no_claim(tmp_path)


@pytest.mark.parametrize("factors", ["lora_", "lora_A"], ids=["one module", "one factor"])
def test_modules_of_different_dtypes_come_back_bit_for_bit(
    tmp_path: Path, make_pico_lora: MakeLora, factors: str
) -> None:
    def mixed(model: PeftModel) -> PeftModel:
        for name, parameter in model.named_parameters():
            if "layers.0." in name and factors in name:
                parameter.data = parameter.data.bfloat16()
        return model

    model = drift(mixed(make_pico_lora(seed=0)))
    model.save_pretrained(tmp_path / "before")
    nlsr_realign(model, patch=make_patch(factors_of(make_pico_lora(seed=0)), selection="all"))
    model.save_pretrained(tmp_path / "after")
    assert_claims(tmp_path / "after")
    revert_folder(tmp_path / "after", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "before" / WEIGHTS).read_bytes()


# ---- several adapters


def test_an_adapter_that_shares_the_configuration_object_is_never_labelled(
    tmp_path: Path, tuned: PeftModel, patch: SafetyPatch
) -> None:
    shared = tuned.peft_config["default"]
    tuned.add_adapter("ref", shared)
    tuned.set_adapter("default")
    nlsr_realign(tuned, patch=patch)
    assert tuned.peft_config["ref"] is shared and type(shared) is LoraConfig
    tuned.save_pretrained(tmp_path)
    assert_claims(tmp_path)
    assert {path.name for path in (tmp_path / "ref").iterdir()} == {CONFIG, WEIGHTS}


def test_each_of_two_adapters_has_its_own_claim(tmp_path: Path, tuned: PeftModel, patch: SafetyPatch) -> None:
    tuned.add_adapter("other", LoraConfig(**{**tuned.peft_config["default"].to_dict(), "peft_type": "LORA"}))
    for name, factor in factors_of(tuned).items():
        layer = tuned.get_submodule(f"base_model.model.{name}")
        layer.lora_A["other"].weight.data.copy_(factor.A)
        layer.lora_B["other"].weight.data.copy_(1.01 * factor.B)
    for name in ("default", "other"):
        tuned.set_adapter(name)
        nlsr_realign(tuned, patch=patch, adapter_name=name)
    tuned.save_pretrained(tmp_path)
    assert_claims(tmp_path)
    assert_claims(tmp_path / "other", tmp_path / README)
    assert (tmp_path / README).read_text().count("nlsr:begin") == 2 and not (tmp_path / "other" / README).exists()
    revert(tuned, "other")
    tuned.save_pretrained(tmp_path)
    assert_claims(tmp_path)
    assert_no_claim(tmp_path / "other")
    assert (tmp_path / README).read_text().count("nlsr:begin") == 1 and set(HOOKS) & set(vars(tuned))
    revert(tuned, "default")
    assert not set(HOOKS) & set(vars(tuned))


def test_a_card_one_folder_up_that_peft_did_not_write_is_not_touched(tmp_path: Path, model: PeftModel) -> None:
    (tmp_path / README).write_text("# My project\n")
    done = model.nlsr_realignment
    model.peft_config["default"].nlsr_adapter = "mine"
    record = {**done.to_dict(), "adapter_name": "mine"}
    claim = model.peft_config["default"].nlsr_claim
    model.peft_config["default"].nlsr_claim = copy.copy(claim)
    object.__setattr__(model.peft_config["default"].nlsr_claim, "record", record)
    model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / README).read_text() == "# My project\n" and "nlsr" in (tmp_path / "mine" / README).read_text()


# ---- the hooks


def test_the_hooks_chain_to_what_was_bound_and_give_it_back(model: PeftModel) -> None:
    revert(model)
    calls: list[str] = []
    model.create_or_update_model_card = calls.append
    bound = model.create_or_update_model_card
    keep_with_adapter(model, _realigned_again(model))
    keep_with_adapter(model, model.nlsr_realignment)
    model.create_or_update_model_card("nowhere")
    assert calls == ["nowhere"]
    forget(model, "default")
    forget(model, "default")
    assert model.create_or_update_model_card is bound and "push_to_hub" not in vars(model)


def _realigned_again(model: PeftModel) -> Realignment:
    patch = make_patch(factors_of(model))
    done = nlsr_realign(model, NLSRConfig(selection="all"), patch=patch).nlsr_realignment
    assert isinstance(done, Realignment)
    return done


def test_a_copy_of_the_model_speaks_of_itself(tmp_path: Path, model: PeftModel) -> None:
    other = copy.deepcopy(model)
    train_on(model)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert_claims(tmp_path / "other")
    assert_no_claim(tmp_path / "model")
    other.create_or_update_model_card(str(tmp_path / "other"))
    assert_claims(tmp_path / "other")
    assert vars(other)["create_or_update_model_card"].owner is other
    revert(other)
    assert vars(model)["create_or_update_model_card"].owner is model and not set(HOOKS) & set(vars(other))


def test_configuration_and_model_can_be_pickled(tmp_path: Path, model: PeftModel) -> None:
    config = pickle.loads(pickle.dumps(model.peft_config["default"]))
    assert type(config) is NLSRLoraConfig and config.nlsr_claim.record == model.nlsr_realignment.to_dict()
    other = pickle.loads(pickle.dumps(model))
    other.save_pretrained(tmp_path)
    other.create_or_update_model_card(str(tmp_path))
    assert_claims(tmp_path)


class MyLoraConfig(LoraConfig):
    """Somebody else's subclass."""


def test_a_foreign_configuration_class_keeps_its_class(tmp_path: Path, tuned: PeftModel, patch: SafetyPatch) -> None:
    tuned.peft_config["default"].__class__ = MyLoraConfig
    nlsr_realign(tuned, patch=patch)
    assert type(tuned.peft_config["default"]) is MyLoraConfig
    tuned.save_pretrained(tmp_path)
    assert_claims(tmp_path)
    train_on(tuned)
    tuned.save_pretrained(tmp_path)
    assert_no_claim(tmp_path)


def test_adapters_injected_by_transformers_keep_their_record_too(
    tmp_path: Path,
    tuned: PeftModel,
    patch: SafetyPatch,
    pico_llama: LlamaForCausalLM,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tuned.save_pretrained(tmp_path / "before")
    pico_llama.load_adapter(str(tmp_path / "before"))
    nlsr_realign(pico_llama, patch=patch)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "peft_nlsr"):
        pico_llama.save_pretrained(tmp_path / "out")
        pico_llama.save_pretrained(tmp_path / "before")
    assert not caplog.text
    for name in ("out", "before"):
        assert_claims(tmp_path / name)
    revert(pico_llama)
    assert not set(HOOKS) & set(vars(pico_llama)) and type(pico_llama.peft_config["default"]) is LoraConfig


# ---- trainers


class ATrainer:
    """As TRL's trainers: it writes a card of its own over whatever is there."""

    def __init__(self, model: PeftModel, folder: Path, *, main: bool = True) -> None:
        self.model, self.args, self.main = model, SimpleNamespace(output_dir=str(folder)), main

    def is_world_process_zero(self) -> bool:
        return self.main

    def create_model_card(self, model_name: str | None = None, tags: list[str] | None = None) -> None:
        text = f"---\nlibrary_name: transformers\ntags: {json.dumps(tags or [])}\n---\n# {model_name}\n"
        (Path(self.args.output_dir) / README).write_text(text)


def test_a_wrapped_trainer_writes_its_card_and_then_the_section(tmp_path: Path, model: PeftModel) -> None:
    model.save_pretrained(tmp_path)
    trainer = ATrainer(model, tmp_path)
    wrap_trainer(trainer)
    wrap_trainer(trainer)
    trainer.create_model_card("Name", tags=["trl"])
    assert_claims(tmp_path)
    text = (tmp_path / README).read_text()
    assert "# Name" in text and ModelCard(text).data.tags == ["trl", *TAGS] and text.count(BEGIN) == 1
    train_on(model)
    model.save_pretrained(tmp_path)
    trainer.create_model_card("Name")
    assert_no_claim(tmp_path)


def test_a_wrapped_trainer_without_a_claim_or_on_another_rank_does_what_it_did(
    tmp_path: Path, model: PeftModel
) -> None:
    model.save_pretrained(tmp_path)
    for main, trained in ((False, model), (True, revert(copy.deepcopy(model)))):
        trainer = ATrainer(trained, tmp_path, main=main)
        wrap_trainer(trainer)
        trainer.create_model_card("Name")
        assert "nlsr" not in (tmp_path / README).read_text()


# ---- PEFT's mapping


@pytest.fixture
def registered() -> Any:
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    register()
    yield before
    unregister()
    unregister()
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING


def test_importing_changes_nothing_of_peft() -> None:
    assert peft_nlsr.register is register and PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig


@pytest.mark.usefixtures("registered")
def test_a_loaded_adapter_keeps_its_record(tmp_path: Path, model: PeftModel, pico_llama: LlamaForCausalLM) -> None:
    keep_with_adapter(model, model.nlsr_realignment, report_of(model.nlsr_realignment))
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(pico_llama, str(tmp_path / "saved"))
    loaded.save_pretrained(tmp_path / "again")
    assert_claims(tmp_path / "again")
    for name in (RECORD, REPORT_NAME, DIFF_NAME, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name
    train_on(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert_no_claim(tmp_path / "again")


@pytest.mark.usefixtures("registered")
def test_sixteen_bits_that_peft_loads_as_thirty_two_keep_their_record(
    tmp_path: Path, make_pico_lora: MakeLora, pico_llama: LlamaForCausalLM
) -> None:
    reference = make_pico_lora(seed=0).to(torch.bfloat16)
    model = drift(make_pico_lora(seed=0).to(torch.bfloat16))
    nlsr_realign(model, patch=make_patch(factors_of(reference))).save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(pico_llama, str(tmp_path / "saved"))
    assert next(iter(factors_of(loaded).values())).A.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    assert_claims(tmp_path / "again")
    revert_folder(tmp_path / "again", tmp_path / "wide")
    revert_folder(tmp_path / "saved", tmp_path / "narrow")
    narrow = {name: tensor.float() for name, tensor in load_file(tmp_path / "narrow" / WEIGHTS).items()}
    assert_same_tensors(load_file(tmp_path / "wide" / WEIGHTS), narrow)
    train_on(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert_no_claim(tmp_path / "again")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_that_comes_with_its_record_is_not_realigned_again(
    tmp_path: Path, make_pico_lora: MakeLora, pico_llama: LlamaForCausalLM, dtype: torch.dtype
) -> None:
    patch = make_patch(factors_of(make_pico_lora(seed=0).to(dtype)))
    nlsr_realign(drift(make_pico_lora(seed=0).to(dtype)), patch=patch).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pico_llama, str(tmp_path))
    with pytest.raises(PeftNLSRError, match=r"'default' was loaded with the record of its realignment \(by sum\)"):
        nlsr_realign(loaded, patch=patch)
    drift(loaded, size=1e-3)
    with pytest.raises(LineageError):  # trained on: new weights, whose factors the patch no longer fits
        nlsr_realign(loaded, NLSRConfig(update="sum"), patch=patch)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_realigned_adapter_in_a_narrower_dtype_is_not_realigned_again(
    tmp_path: Path, make_pico_lora: MakeLora, pico_llama: LlamaForCausalLM, dtype: torch.dtype
) -> None:
    patch = make_patch(factors_of(make_pico_lora(seed=0)))
    nlsr_realign(drift(make_pico_lora(seed=0)), patch=patch).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pico_llama, str(tmp_path)).to(dtype)
    with pytest.raises(PeftNLSRError, match=r"'default' was loaded with the record of its realignment \(by sum\)"):
        nlsr_realign(loaded, patch=patch)
    drift(loaded, size=0.1)
    with pytest.raises(LineageError):  # trained on: new weights
        nlsr_realign(loaded, NLSRConfig(update="sum"), patch=patch)


@pytest.mark.usefixtures("registered")
def test_a_record_that_cannot_be_read_does_not_stop_the_adapter(
    tmp_path: Path, model: PeftModel, pico_llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / RECORD).write_text("{")
    with caplog.at_level(logging.WARNING, "peft_nlsr"):
        loaded = PeftModel.from_pretrained(pico_llama, str(tmp_path))
    assert_same_factors(factors_of(loaded), factors_of(model))
    assert "loaded without its safety record" in caplog.text
    loaded.save_pretrained(tmp_path)
    assert_no_claim(tmp_path)


@pytest.mark.usefixtures("registered")
def test_an_adapter_without_a_record_loads_as_ever(
    tmp_path: Path, tuned: PeftModel, pico_llama: LlamaForCausalLM
) -> None:
    tuned.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(pico_llama, str(tmp_path / "saved"), adapter_name="mine")
    assert_same_factors(factors_of(loaded), factors_of(tuned))
    loaded.save_pretrained(tmp_path / "again")
    assert_no_claim(tmp_path / "again" / "mine")
    assert get_peft_model(loaded.unload(), LoraConfig(task_type="CAUSAL_LM")).peft_config["default"].r == 8


def test_vanilla_peft_loads_what_was_saved(tmp_path: Path, model: PeftModel, pico_llama: LlamaForCausalLM) -> None:
    pico_llama.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "saved"))
    assert_same_factors(factors_of(loaded), factors_of(model))
    assert type(loaded.peft_config["default"]) is LoraConfig


# ---- files


def test_realigning_files_writes_the_card_and_reverting_gives_it_back(
    tmp_path: Path, make_pico_lora: MakeLora, patch: SafetyPatch
) -> None:
    drift(make_pico_lora(seed=0)).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / README).write_bytes(b"---\nlicense: mit # mine\n---\r\n# Mine\r\n")
    realign_folder(tmp_path / "in", tmp_path / "out", patch=patch)
    assert_claims(tmp_path / "out")
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "in")
    with open(tmp_path / "out" / README, "a") as file:
        file.write("\nMore of mine.\n")
    revert_folder(tmp_path / "out", tmp_path / "edited")
    assert_no_claim(tmp_path / "edited")
    text = (tmp_path / "edited" / README).read_text()
    assert "# Mine" in text and "More of mine." in text and "license: mit" in text


def test_files_without_a_card_get_one_and_lose_it_again(
    tmp_path: Path, make_pico_lora: MakeLora, patch: SafetyPatch
) -> None:
    drift(make_pico_lora(seed=0)).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / README).unlink()
    realign_folder(tmp_path / "in", tmp_path / "out", patch=patch)
    assert_claims(tmp_path / "out")
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "in")


@pytest.mark.parametrize(
    "yaml",
    [
        "base_model: {}",
        "base_model:\n- {}",
        "base_model: [org/base, '{}']",
        "base_model: org/base\ntags:\n- mine\n- base_model:adapter:{}",
        "base_model:\n  {}",
    ],
    ids=["line", "list", "second of a list", "tag", "next line"],
)
def test_the_undo_does_not_repeat_a_path_of_this_machine(
    tmp_path: Path, make_pico_lora: MakeLora, patch: SafetyPatch, yaml: str
) -> None:
    drift(make_pico_lora(seed=0)).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / README).write_text(f"---\n{yaml.format(tmp_path)}\n---\n# Mine\n")
    realign_folder(tmp_path / "in", tmp_path / "out", patch=patch)
    for name in (DIFF_NAME, README, RECORD):
        assert str(tmp_path).encode() not in (tmp_path / "out" / name).read_bytes(), name
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert_no_claim(tmp_path / "back")
    assert (tmp_path / "back" / README).read_text().endswith("# Mine\n")


def test_an_old_section_in_the_input_is_replaced(tmp_path: Path, model: PeftModel, patch: SafetyPatch) -> None:
    model.save_pretrained(tmp_path / "in")
    after = model.nlsr_realignment.fingerprint_after
    revert(model).save_pretrained(tmp_path / "original")
    tensors = load_file(tmp_path / "original" / WEIGHTS)
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, tmp_path / "in" / WEIGHTS)
    realign_folder(tmp_path / "in", tmp_path / "out", patch=patch)
    assert_claims(tmp_path / "out")
    text = (tmp_path / "out" / README).read_text()
    assert text.count(BEGIN) == 1 and after not in text
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert_no_claim(tmp_path / "back")


def test_a_card_that_is_not_utf8_does_not_stop_a_save(
    tmp_path: Path, model: PeftModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path)
    train_on(model)
    (tmp_path / README).write_bytes("# Für alle".encode("latin-1"))
    with caplog.at_level(logging.WARNING, "peft_nlsr"):
        model.peft_config["default"].save_pretrained(str(tmp_path))
    assert "is not UTF-8" in caplog.text
