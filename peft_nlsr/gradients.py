"""Per-sample absolute gradients of the LoRA factors, for SNIP and preference SNIP.

Source: SNIP on the factors, NLSR (arXiv 2412.12497) baselines. Differs from the release, whose missing ``zero_grad``
sums the absolute value of *accumulated* gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import switched_off
from .errors import CalibrationError, UnsupportedAdapterError
from .live_adapter import LiveAdapter
from .scores import FactorPair

DPO_BETA = 0.1


def gradient_sums(adapter: LiveAdapter, batch: Mapping[str, Any], kind: str) -> dict[str, FactorPair]:
    """Module -> ``(sum_k |dL_k/dA|, sum_k |dL_k/dB|)`` over the samples of one batch, shapes of A and B.

    Args:
        batch: for ``snip`` a batch with labels, ``L_k`` the mean NLL of the answer of sample k; for
            ``preference_snip``
            ``{"chosen": batch, "rejected": batch}``, ``L_k`` the DPO loss (beta 0.1) with the base model as reference.

    One backward pass for the whole batch: ``dL_k/dA = sum_t dh_t x_t^T`` and ``dL_k/dB = sum_t dy_t h_t^T``. Modules
    that did not run (routed experts) are left out.
    """
    _require_backward(adapter.model)
    pairs = 1
    if kind == "preference_snip":
        batch, pairs = _stack(batch["chosen"], batch["rejected"]), 2
    parameters = {n: _factors(adapter, n) for n in adapter.layers}
    flat = [p for pair in parameters.values() for p in pair]
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    for parameter in flat:
        parameter.requires_grad_(True)
    with torch.enable_grad(), _recorded(adapter) as (inputs, gradients):
        scores = _answer_log_likelihood(adapter.model, batch, mean=kind == "snip")
        loss = -scores.sum() if kind == "snip" else _dpo_loss(adapter, batch, scores)
        torch.autograd.grad(loss, flat, allow_unused=True)
    return {
        name: (
            _absolute(gradients[name, "lora_A"], inputs[name, "lora_A"], len(scores), pairs),
            _absolute(gradients[name, "lora_B"], inputs[name, "lora_B"], len(scores), pairs),
        )
        for name in adapter.layers
        if (name, "lora_A") in gradients
    }


def _require_backward(model: Any) -> None:
    """bitsandbytes computes with 4-bit weights on some CPUs in a way that has no backward pass."""
    fast = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    if any(module.weight.device.type == "cpu" for module in fast):
        raise UnsupportedAdapterError(
            "gradient scores cannot be computed on a 4-bit base on this CPU, because bitsandbytes has no backward "
            "pass there; use score='low_rank' or 'wanda', a GPU, or a base that is not quantised"
        )


def _factors(adapter: LiveAdapter, name: str) -> tuple[Any, Any]:
    layer, key = adapter.layers[name], adapter.info.adapter_name
    return layer.lora_A[key].weight, layer.lora_B[key].weight


@contextmanager
def _recorded(adapter: LiveAdapter) -> Iterator[tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], Tensor]]]:
    """Inputs of every ``lora_A`` and ``lora_B``, and the gradients at their outputs once a loss is differentiated."""
    inputs: dict[tuple[str, str], Tensor] = {}
    gradients: dict[tuple[str, str], Tensor] = {}

    def note(key: tuple[str, str], x: Tensor, out: Tensor) -> None:
        if torch.is_grad_enabled():
            inputs[key] = x.detach()
            out.register_hook(lambda gradient: gradients.__setitem__(key, gradient.detach()))

    handles = []
    for name, layer in adapter.layers.items():
        for kind in ("lora_A", "lora_B"):
            linear = getattr(layer, kind)[adapter.info.adapter_name]
            handles.append(
                linear.register_forward_hook(lambda _, args, out, key=(name, kind): note(key, args[0], out))
            )
    try:
        yield inputs, gradients
    finally:
        for handle in handles:
            handle.remove()


def _absolute(gradient: Tensor, x: Tensor, rows: int, pairs: int) -> Tensor:
    # Some models (OPT) flatten batch and tokens into one dimension.
    gradient, x = (t.float().reshape(rows, -1, t.shape[-1]) for t in (gradient, x))
    per_sample = torch.einsum("bto,bti->boi", gradient, x)
    samples = per_sample.unflatten(0, (pairs, -1)).sum(dim=0)
    return samples.abs().sum(dim=0).to("cpu", torch.float64)


def _answer_log_likelihood(model: Any, batch: Mapping[str, Tensor], *, mean: bool) -> Tensor:
    """``(samples,)`` log-likelihood of each answer, summed or averaged over its tokens."""
    if "labels" not in batch or batch["labels"].ndim != 2:
        raise CalibrationError("gradient scores need labels for each token in each batch (-100 outside the answer)")
    logits = model(**{k: v for k, v in batch.items() if k != "labels"} | _decoder_inputs(model, batch)).logits
    labels = batch["labels"]
    if not getattr(model.config, "is_encoder_decoder", False):
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    total = -losses.reshape(labels.shape).sum(dim=1)
    return total / (labels != -100).sum(dim=1).clamp_min(1) if mean else total


def _decoder_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"labels": batch["labels"]} if getattr(model.config, "is_encoder_decoder", False) else {}


def _dpo_loss(adapter: LiveAdapter, batch: Mapping[str, Tensor], scores: Tensor) -> Tensor:
    with torch.no_grad(), switched_off(adapter):
        reference = _answer_log_likelihood(adapter.model, batch, mean=False)
    chosen, rejected = (scores - reference).chunk(2)
    return -F.logsigmoid(DPO_BETA * (chosen - rejected)).sum()


def _stack(chosen: Mapping[str, Tensor], rejected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both batches in one, each tensor padded on the right to the longer of the two; chosen first."""
    missing = {"input_ids", "attention_mask", "labels"} - (set(chosen) & set(rejected))
    if missing:
        raise CalibrationError(f"preference batches lack {sorted(missing)} in chosen or rejected")
    fill = {"labels": -100}

    def stacked(key: str) -> Tensor:
        pair = (chosen[key], rejected[key])
        longest = max(part.shape[1] for part in pair)
        return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=fill.get(key, 0)) for part in pair])

    return {key: stacked(key) for key in ("input_ids", "attention_mask", "labels")}
