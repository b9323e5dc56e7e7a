"""A base in 4 or 8 bits: the adapter is realigned for the weights that the base really computes with."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_lora
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from tiny import assert_same_factors, drift, factors_of, quick, refuses_attacks, rows, word_tokenizer
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from peft_nlsr import LowRank, NLSRConfig, UnsupportedAdapterError, nlsr_realign, open_adapter, plan, revert
from peft_nlsr.generation import model_digest
from peft_nlsr.gradients import gradient_sums
from peft_nlsr.live_adapter import LiveAdapter

pytest.importorskip("bitsandbytes")

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
METHODS: dict[str, NLSRConfig] = {
    "two_teacher": quick(),
    "one_shot": quick(update="least_squares", least_squares_form="one_shot"),
    "sum-snip": quick(update="sum", score="snip"),
    "fgsn": quick(method="fgsn"),
}
# LLM.int8() rounds activations too, which nothing dense does.
TOLERANCE = {"nf4": 1e-5, "fp4": 1e-5, "int8": 0.1}


def with_lora(base: LlamaForCausalLM) -> PeftModel:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(base, lora)
    randomise_lora(model, "default", seed=0)
    return drift(model.eval())


def quantised(base: LlamaForCausalLM, folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The base in 4 or 8 bits."""
    base.save_pretrained(folder)
    settings = dict(KINDS[kind])
    if kind != "int8":
        settings["bnb_4bit_compute_dtype"] = dtype
    model = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu", dtype=dtype
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that kernel needs wider layers, and computes in bfloat16
    return model


def dense(base: LlamaForCausalLM, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of the base with the weights that the quantised model computes with."""
    twin = copy.deepcopy(base)
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            twin.get_submodule(name).weight.data = dequantize_module_weight(module).float()
    return twin


def given_to(model: PeftModel, config: NLSRConfig) -> dict[str, Any]:
    given: dict[str, Any] = {"tokenizer": word_tokenizer(), "judge": refuses_attacks, "progress": False}
    given["calibration"] = [{"prompt": f"attack the word{i}", "response": "no never"} for i in range(6)]
    if config.update != "sum":
        given["utility"] = rows(8, poisoned=(2, 5))
    if config.update == "sum" or config.method == "fgsn":
        generator = torch.Generator().manual_seed(3)
        given["reference"] = {
            name: LowRank(u.A + 0.03 * torch.randn(u.A.shape, generator=generator), u.B, u.scale)
            for name, u in factors_of(model).items()
        }
    return given


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_that_of_the_dense_model_with_the_same_weights(
    pico_llama: LlamaForCausalLM, tmp_path: Path, kind: str, method: str
) -> None:
    base = quantised(pico_llama, tmp_path, kind)
    plain, model = with_lora(dense(pico_llama, base)), with_lora(base)
    config = METHODS[method]
    wanted = plan(plain, config, **given_to(plain, config)).updates
    found = plan(model, config, **given_to(plain, config)).updates
    assert list(found) == list(wanted)
    for name, update in wanted.items():
        difference = found[name].scale * found[name].B @ found[name].A - update.scale * update.B @ update.A
        assert float(difference.norm()) <= TOLERANCE[kind] * abs(update.scale) * float((update.B @ update.A).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits_it_is_realigned_and_reverted(pico_llama: LlamaForCausalLM, tmp_path: Path, kind: str) -> None:
    model = with_lora(quantised(pico_llama, tmp_path / "base", kind, torch.bfloat16))
    before, digest = factors_of(model), model_digest(model)
    nlsr_realign(model, quick(), **given_to(model, quick()))
    assert model_digest(model) != digest
    model.save_pretrained(tmp_path / "saved")
    assert_same_factors(dict(open_adapter(tmp_path / "saved")), factors_of(model))
    revert(model)
    assert_same_factors(factors_of(model), before)
    assert model_digest(model) == digest


def test_gradient_scores_are_refused_where_bitsandbytes_has_no_backward_pass(
    pico_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = with_lora(quantised(pico_llama, tmp_path, "nf4"))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    batch = {"input_ids": torch.tensor([[1, 5]]), "labels": torch.tensor([[-100, 5]])}
    with pytest.raises(UnsupportedAdapterError, match=r"no backward pass .*low_rank"):
        gradient_sums(LiveAdapter(model), batch, "snip")
