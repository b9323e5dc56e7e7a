"""A base that accelerate keeps on the CPU or on disk gives the results of one in memory, and stays where it is.

The CPU stands in for the accelerator: hooks, meta parameters and files are the real ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, hooks
from conftest import randomise_lora
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import (
    assert_same_factors,
    drift,
    factors_of,
    make_patch,
    quick,
    refuses_attacks,
    rows,
    word_tokenizer,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from peft_nlsr import (
    LowRank,
    NLSRCallback,
    NLSRConfig,
    PromptSet,
    UnsupportedAdapterError,
    collect_statistics,
    evaluate,
    nlsr_realign,
    open_adapter,
    plan,
    revert,
)
from peft_nlsr.blocks import Place, run_until
from peft_nlsr.generation import generate_answers, model_digest
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.offloading import bring_in, held, input_device

MakeLora = Callable[..., PeftModel]
CPU = torch.device("cpu")
LLAMA = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
GPT2 = ("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h.0", "transformer.h.1")
PLACES = {
    "llama": {name: "disk" if name.endswith(".1") else "cpu" for name in LLAMA},
    "gpt2": {name: "disk" if name.endswith(".1") else "cpu" for name in (*GPT2, "transformer.ln_f", "lm_head")},
}
PREFIX = "base_model.model."


def make_gpt2() -> PeftModel:
    """A LoRA, drawn anew, on a GPT-2 with tied embeddings, the same in each call."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(GPT2LMHeadModel(config), lora)
    randomise_lora(model, "default", seed=0)
    return model.eval()


def part_on_disk(model: PeftModel, folder: Path) -> PeftModel:
    kind = "gpt2" if isinstance(model.get_base_model(), GPT2LMHeadModel) else "llama"
    places = {PREFIX + name: place for name, place in PLACES[kind].items()}
    return dispatch_model(model, device_map=places, offload_dir=str(folder), main_device="cpu")


def loaded_by_peft(model: PeftModel, folder: Path) -> PeftModel:
    """The other order: a base with a device map, and then the saved adapter."""
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=PLACES["llama"], offload_folder=folder / "offloaded"
    )
    places = {PREFIX + name: place for name, place in PLACES["llama"].items()}
    again = folder / "offloaded again"
    return PeftModel.from_pretrained(
        base, str(folder / "adapter"), device_map=places, offload_folder=str(again)
    ).eval()


OFFLOADED: dict[str, Callable[[PeftModel, Path], PeftModel]] = {
    "cpu": lambda model, _: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device=CPU),
    "part": part_on_disk,
    "loaded": loaded_by_peft,
}
DATA: dict[str, Any] = {
    "calibration": [{"prompt": f"attack the word{i}", "response": "no never"} for i in range(6)],
    "utility": rows(8, poisoned=(2, 5)),
}
METHODS: dict[str, tuple[NLSRConfig, tuple[str, ...]]] = {
    "two_teacher": (quick(), ("calibration", "utility")),
    "two_teacher-reference": (quick(), ("calibration", "utility", "reference")),
    "two_teacher-dual": (quick(solver="dual"), ("calibration", "utility")),
    "one_shot": (quick(update="least_squares", least_squares_form="one_shot"), ("calibration", "utility")),
    "sum-patch": (quick(update="sum"), ("patch",)),
    "sum-snip": (quick(update="sum", score="snip"), ("reference", "calibration")),
    "released": (NLSRConfig.from_preset("released", max_samples=8, max_length=24), ("reference", "calibration")),
    "fgsn": (quick(method="fgsn"), ("calibration", "utility", "reference")),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT writes what it offloads again under a relative path


@pytest.fixture(params=["llama-cpu", "llama-part", "llama-loaded", "gpt2-disk"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, make_pico_lora: MakeLora) -> tuple[PeftModel, PeftModel]:
    """A fine-tuned model in memory, and the same offloaded."""
    kind, _, how = request.param.partition("-")
    make = make_gpt2 if kind == "gpt2" else make_pico_lora
    return drift(make()), OFFLOADED[how](drift(make()), tmp_path / "files")


def base_places(model: PeftModel) -> dict[str, torch.device]:
    return {name: p.device for name, p in model.named_parameters(remove_duplicate=False) if "lora_" not in name}


def reference_for(model: PeftModel) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(3)

    def moved(factor: torch.Tensor) -> torch.Tensor:
        return factor + 0.03 * torch.randn(factor.shape, generator=generator)

    return {name: LowRank(moved(u.A), moved(u.B), u.scale) for name, u in factors_of(model).items()}


def given_to(model: PeftModel, needed: tuple[str, ...]) -> dict[str, Any]:
    reference = reference_for(model)
    patch = make_patch(reference)
    given = {**DATA, "reference": reference, "patch": patch}
    teach = {"tokenizer": word_tokenizer(), "judge": refuses_attacks, "progress": False}
    return {name: given[name] for name in needed} | teach


def assert_close(found: dict[str, LowRank], wanted: dict[str, LowRank]) -> None:
    assert list(found) == list(wanted)
    for name, update in wanted.items():
        dense = update.scale * update.B @ update.A
        mine = found[name].scale * found[name].B @ found[name].A
        assert float((mine - dense).norm()) <= 1e-5 * float(dense.norm()), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pair", ["llama-disk", "gpt2-part"], indirect=True)
def test_a_plan_is_that_of_the_model_in_memory(pair: tuple[PeftModel, PeftModel], method: str) -> None:
    plain, offloaded = pair
    before = base_places(offloaded)
    assert torch.device("meta") in before.values()
    config, needed = METHODS[method]
    wanted = plan(plain, config, **given_to(plain, needed)).updates
    found = plan(offloaded, config, **given_to(plain, needed)).updates
    assert_close(found, wanted)
    assert base_places(offloaded) == before
    assert_same_factors(factors_of(offloaded), factors_of(plain))


def test_it_is_realigned_saved_and_reverted(pair: tuple[PeftModel, PeftModel], tmp_path: Path) -> None:
    plain, offloaded = pair
    for model in pair:
        nlsr_realign(model, quick(), **given_to(plain, ("calibration", "utility")))
    assert_close(factors_of(offloaded), factors_of(plain))
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(offloaded(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    offloaded.save_pretrained(tmp_path / "saved")
    assert_same_factors(dict(open_adapter(tmp_path / "saved")), factors_of(offloaded))
    assert (tmp_path / "saved" / "nlsr_config.json").is_file()
    for model in pair:
        revert(model)
    assert_same_factors(factors_of(offloaded), factors_of(plain))


def test_it_answers_and_is_measured_alike(pair: tuple[PeftModel, PeftModel]) -> None:
    tokenizer = word_tokenizer()
    prompts = [(1, 5, 6), (7, 8, 9, 10)]
    texts = [PromptSet("asked", "safety", ("a", "b"), ("attack the lamp", "paint the vase"))]
    batch = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    found = []
    for model in pair:
        answers = generate_answers(model, tokenizer, prompts, max_new_tokens=4, batch_size=2)
        settings: dict[str, Any] = {"judge": refuses_attacks, "max_new_tokens": 3, "progress": False}
        rates = evaluate(model, tokenizer, prompts=texts, **settings).to_dict()
        grams = {n: s.z_gram for n, s in collect_statistics(model, [batch], progress=False).items()}
        found.append((answers, {k: v for k, v in rates.items() if k != "seconds"}, grams))
    assert found[0][0] == found[1][0] and found[0][1] == found[1][1]
    for name, gram in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], gram, rtol=1e-5, atol=1e-5)


def test_its_digest_is_that_of_the_model_in_memory(pair: tuple[PeftModel, PeftModel]) -> None:
    plain, offloaded = pair
    assert model_digest(plain) == model_digest(offloaded)


def test_offloading_a_changed_base_changes_the_digest(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    other = make_pico_lora()
    with torch.no_grad():
        other.get_base_model().model.layers[1].mlp.up_proj.weight.mul_(2.0)
    one = disk_offload(make_pico_lora(), str(tmp_path / "one"), execution_device=CPU)
    assert model_digest(one) != model_digest(disk_offload(other, str(tmp_path / "other"), execution_device=CPU))


def test_only_the_adapter_is_brought_in(make_pico_lora: MakeLora) -> None:
    model = cpu_offload(make_pico_lora(modules_to_save=["lm_head"]), execution_device=CPU)
    LiveAdapter(model)
    there = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    mine = {n for n, _ in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    assert there == mine and len(mine) == 13


def test_factors_that_peft_lost_are_refused(pico_llama: LlamaForCausalLM) -> None:
    base = cpu_offload(pico_llama, execution_device=CPU)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedAdapterError, match=r"a factor without values .*q_proj.*offload the model after"):
        nlsr_realign(model, quick())


def test_inputs_go_where_the_first_parameters_compute(pico_llama: LlamaForCausalLM) -> None:
    assert input_device(pico_llama) == CPU
    assert input_device(cpu_offload(pico_llama, execution_device=CPU)) == CPU


def test_gradient_flags_come_back_although_each_pass_makes_new_parameters(make_pico_lora: MakeLora) -> None:
    model = cpu_offload(make_pico_lora(), execution_device=CPU)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config, needed = METHODS["sum-snip"]
    plan(model, config, **given_to(model, needed))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_held_block_is_fetched_once(pico_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1, 5, 6, 7]])
    wanted = pico_llama(input_ids=ids).logits
    fetched: list[str] = []
    move = hooks.set_module_tensor_to_device

    def counted(module: Any, name: str, *args: Any, **kwargs: Any) -> None:
        fetched.append(name)
        move(module, name, *args, **kwargs)

    model = cpu_offload(pico_llama, execution_device=CPU)
    monkeypatch.setattr(hooks, "set_module_tensor_to_device", counted)
    with pytest.raises(KeyboardInterrupt), held(model):
        fetched.clear()
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=0)
        assert not fetched
        raise KeyboardInterrupt
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=0)


class Elsewhere(torch.nn.Module):
    """A block that a device map has put on another device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape, device="cuda:1")


def test_what_a_block_on_another_device_computes_comes_back() -> None:
    with FakeTensorMode():
        block, hidden = Elsewhere(), torch.zeros(2, 3, 4, device="cuda:0")
        seen = run_until({"x": Place(block, output=True)}, block, hidden, ((), {}))
    assert seen["x"].device == hidden.device


def test_what_is_in_memory_is_not_touched(pico_llama: LlamaForCausalLM) -> None:
    weight = pico_llama.lm_head.weight
    bring_in(pico_llama.lm_head)
    assert pico_llama.lm_head.weight is weight


def test_training_that_would_not_reach_the_factors_is_refused(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model = part_on_disk(make_pico_lora(), tmp_path / "files")
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    data = [{"input_ids": [1, 5, 6], "labels": [1, 5, 6], "attention_mask": [1, 1, 1]}] * 4
    tokenizer = word_tokenizer()
    callback = NLSRCallback(quick(), tokenizer=tokenizer, judge=refuses_attacks, evaluate=False)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=[callback])
    with pytest.raises(UnsupportedAdapterError, match=r"to be trained are offloaded.*4 bits"):
        trainer.train()
