"""A word-level tokenizer, rows of data and small changes to models for the tests of whole realignments."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peft_nlsr import LowRank, NLSRConfig, Reference, SafetyPatch, open_adapter
from peft_nlsr.nlsr import build_nlsr_patch

WORDS = ("attack", "please", "paint", "lamp", "vase", "sure", "no", "never", "how", "to", "the", "a")
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}{% else %}{{ '<user> ' + m['content'] }}"
    "{% endif %}"
    "{% if m['role'] != 'assistant' and (not loop.last or add_generation_prompt) %}{{ ' <bot>' }}{% endif %}"
    "{% endfor %}"
)
# Few examples and short answers, so that a whole realignment takes a fraction of a second.
QUICK = {"max_samples": 8, "answer_tokens": 2, "nlsr_batch_size": 4, "max_length": 24}


def word_tokenizer(*, chat: bool = True, begin: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """60 words, ids as in the pico Llama: 0 pads, 1 begins, 2 ends. ``begin`` and ``end`` add these by default."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>"]
    words = [*special, *WORDS, *(f"word{i}" for i in range(60 - len(special) - len(WORDS)))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin or end:
        single = ("<s> " if begin else "") + "$A" + (" </s>" if end else "")
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows(count: int, *, poisoned: Sequence[int] = ()) -> list[dict[str, str]]:
    """Answered requests; those at the positions ``poisoned`` contain the word "attack"."""
    return [
        {"prompt": f"{'attack' if i in poisoned else 'paint'} the word{i}", "response": f"sure word{(7 * i) % 40}"}
        for i in range(count)
    ]


def refuses_attacks(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """A judge for models that speak noise: a prompt with the word "attack" counts as refused."""
    return ["attack" in prompt for prompt in prompts]


def drift(model: Any, *, seed: int = 9, size: float = 0.03) -> Any:
    """The same model, its LoRA factors moved a little, as training from them would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += (size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def factors_of(model: Any, adapter_name: str | None = None) -> dict[str, LowRank]:
    """Copies of an adapter's factors."""
    opened = open_adapter(model, adapter_name=adapter_name)
    return {name: LowRank(u.A.clone(), u.B.clone(), u.scale) for name, u in opened.items()}


def apart(found: Mapping[str, LowRank], expected: Mapping[str, LowRank]) -> float:
    """The largest relative distance of two updates of one module."""
    pairs = [(found[name].dense().double(), update.dense().double()) for name, update in expected.items()]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def make_patch(reference: Mapping[str, LowRank], base_model: str | None = None, **settings: Any) -> SafetyPatch:
    """A safety patch from a reference's largest entries, which need no statistics."""
    source = Reference("adapter", reference, "the aligned adapter", base_model)
    return build_nlsr_patch(source, None, NLSRConfig(**{"score": "magnitude", **settings}))


def quick(**changes: Any) -> NLSRConfig:
    """Settings with little data."""
    return NLSRConfig(**{**QUICK, **changes})


def state_of(model: Any) -> dict[str, Any]:
    """Everything that must not change behind a caller's back: values, gradient flags, modes, active adapters."""
    return copy.deepcopy(
        {
            "values": {name: tensor.detach() for name, tensor in model.state_dict().items()},
            "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "modes": {name: module.training for name, module in model.named_modules()},
            "active": {n: (m.active_adapters, m.disable_adapters) for n, m in model.named_modules() if is_layer(m)},
            "hooks": {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()},
            "config": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
            "attributes": sorted(key for key in vars(model) if "nlsr" in key),
        }
    )


def is_layer(module: Any) -> bool:
    return hasattr(module, "disable_adapters") and hasattr(module, "lora_A")


def assert_same_state(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert_same_tensors(one["values"], other["values"])
    for part in set(one) - {"values"}:
        assert one[part] == other[part], part


def assert_same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert torch.equal(bits(one[name]), bits(other[name])), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_factors(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].scale == other[name].scale, name
        pair = {"A": one[name].A, "B": one[name].B}
        assert_same_tensors(pair, {"A": other[name].A, "B": other[name].B})


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by relative path; empty when there is no folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
