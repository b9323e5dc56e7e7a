"""Calibration statistics: one pass over the data against the published order, one pass of the model per block.

The published order also reduces a block before it calibrates the next. Here the weights stay untouched in both ways,
so that the statistics must be equal; the cost is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_nlsr.calibration import collect_statistics
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.scores import ModuleStatistics
from peft_nlsr.selection import block_of

from .timing import alternate

Sums = dict[str, dict[str, Tensor]]


def measure(config: dict[str, Any]) -> list[dict[str, Any]]:
    """One row: seconds, ratio and the largest relative difference of a statistic."""
    adapter = _random_adapter(config)
    batches = _random_batches(config)
    figures, ours, baseline = alternate(
        lambda: collect_statistics(adapter, batches, progress=False),
        lambda: _one_pass_per_block(adapter, batches),
        repeats=config["repeats"],
    )
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    name = f"{config['model']['num_hidden_layers']} blocks"
    return [{"name": name, **figures, "error": _largest_difference(ours, baseline), "tokens": tokens}]


def _random_adapter(config: dict[str, Any]) -> LiveAdapter:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config["model"]))
    lora = LoraConfig(r=config["rank"], lora_alpha=2 * config["rank"], target_modules="all-linear")
    return LiveAdapter(get_peft_model(model, lora).eval())


def _random_batches(config: dict[str, Any]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    size = (config["batch_size"], config["length"])
    drawn = [
        torch.randint(3, config["model"]["vocab_size"], size, generator=generator) for _ in range(config["batches"])
    ]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]


def _one_pass_per_block(adapter: LiveAdapter, batches: list[dict[str, Tensor]]) -> Sums:
    sums: Sums = {}
    for block in dict.fromkeys(block_of(name) for name in adapter):
        layers = {name: layer for name, layer in adapter.layers.items() if block_of(name) == block}
        sums.update(_pass_for(adapter, layers, batches))
    return sums


@torch.no_grad()
def _pass_for(adapter: LiveAdapter, layers: Mapping[str, nn.Module], batches: list[dict[str, Tensor]]) -> Sums:
    A = {name: adapter[name].A for name in layers}
    sums = {name: {"z_gram": torch.tensor(0.0), "x_square": torch.tensor(0.0)} for name in layers}

    def note(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        z = x @ A[name].T
        sums[name]["z_gram"] = sums[name]["z_gram"] + (z.T @ z).double()
        sums[name]["x_square"] = sums[name]["x_square"] + x.square().sum(dim=0).double()

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        for batch in batches:
            adapter.model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _largest_difference(ours: Mapping[str, ModuleStatistics], baseline: Sums) -> float:
    if set(ours) != set(baseline):
        raise ValueError(
            f"{len(ours)} modules in one pass, {len(baseline)} in the passes per block; expected the same"
        )
    return max(
        float((getattr(ours[name], kind) - wanted).norm() / wanted.norm())
        for name, kinds in baseline.items()
        for kind, wanted in kinds.items()
    )
