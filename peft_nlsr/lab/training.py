"""Small training loops on one model: language modelling with masked prompts, DPO, and a fresh LoRA adapter.

Plain torch on `transformers` and `peft` models. The caller seeds every loop; only trainable parameters change.
Batches are padded on the right without an attention mask: under causal attention no real token sees the padding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from .world import END, render

IGNORED = -100
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = {"all": (*ATTENTION, "gate_proj", "up_proj", "down_proj"), "attention": ATTENTION}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0, betas=(0.9, 0.98)),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


@dataclass(frozen=True)
class Tokens:
    """One training text: its token ids and the labels, `IGNORED` where nothing is to be learned."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, and by how much a frozen model already prefers the first (in nats)."""

    chosen: Tokens
    rejected: Tokens
    reference: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; linear warm-up over the first tenth, cosine decay to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    optimizer: str = "adamw"


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Tokens]:
    """Return texts to be learned in full."""
    return [Tokens(ids, ids) for ids in tokenizer(list(texts))["input_ids"]]


def encode_examples(tokenizer: PreTrainedTokenizerFast, examples: Sequence[dict[str, Any]]) -> list[Tokens]:
    """Return chat turns of which only the response (and its end) is to be learned."""
    prompts = tokenizer([render(example["prompt"]) for example in examples])["input_ids"]
    responses = tokenizer([f"{example['response']} {END}" for example in examples])["input_ids"]
    return [Tokens(p + r, [IGNORED] * len(p) + r) for p, r in zip(prompts, responses, strict=True)]


def add_lora(model: nn.Module, *, rank: int, seed: int, modules: str = "all", rslora: bool = False) -> PeftModel:
    """Return `model` with a fresh trainable LoRA adapter of scale 2, also where it is rank-stabilised.

    Args:
        modules: "all" seven kinds of linear layers, or the four of "attention".
    """
    alpha = round(2 * rank**0.5) if rslora else 2 * rank
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=list(LINEARS[modules]), task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def fit(
    model: nn.Module,
    data: Sequence[Any],
    loss: Callable[[nn.Module, Sequence[Any]], Tensor],
    *,
    schedule: Schedule,
    progress: Callable[[float], None],
) -> None:
    """Train the trainable parameters of `model` on `data` in place; `loss(model, batch)` says what to minimise."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[schedule.optimizer](parameters, lr=schedule.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, schedule.steps))
    model.train()
    for step, batch in enumerate(_batches(data, schedule), start=1):
        optimizer.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        progress(step / schedule.steps)
    model.eval()


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _batches(data: Sequence[Any], schedule: Schedule) -> Iterator[list[Any]]:
    """Yield `steps` batches from reshuffled passes over the data."""
    rng = random.Random(schedule.seed)
    waiting: list[Any] = []
    for _ in range(schedule.steps):
        while len(waiting) < schedule.batch_size:
            waiting.extend(rng.sample(data, len(data)))
        batch, waiting = waiting[: schedule.batch_size], waiting[schedule.batch_size :]
        yield batch


def lm_loss(model: nn.Module, batch: Sequence[Tokens]) -> Tensor:
    """Return the mean cross-entropy of the labelled tokens."""
    ids, labels = _pad(batch)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def dpo_loss(model: nn.Module, batch: Sequence[Preference], *, beta: float, anchor: float) -> Tensor:
    """Return the DPO loss (arXiv 2305.18290, eq. 7) plus `anchor` times the chosen answer's loss per token.

    Larger `beta` stays closer to the reference. Larger `anchor` keeps the chosen answer likely (arXiv 2404.19733);
    at 0 only the difference to the rejected answer counts, and amplifying the adapter unlearns both.
    """
    chosen, rejected = _log_likelihoods(model, batch)
    lengths = torch.tensor([sum(label != IGNORED for label in pair.chosen.labels) for pair in batch])
    margins = chosen - rejected - torch.tensor([pair.reference for pair in batch])
    return (-F.logsigmoid(beta * margins) - anchor * chosen / lengths).mean()


@torch.no_grad()
def with_reference(model: nn.Module, pairs: Sequence[Preference], *, batch_size: int = 128) -> list[Preference]:
    """Return `pairs` with the preference of `model`, as it is now, filled in as their reference."""
    filled = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        chosen, rejected = _log_likelihoods(model, chunk)
        filled += [replace(pair, reference=m) for pair, m in zip(chunk, (chosen - rejected).tolist(), strict=True)]
    return filled


def _log_likelihoods(model: nn.Module, batch: Sequence[Preference]) -> tuple[Tensor, Tensor]:
    """Return log p(chosen) and log p(rejected) of each pair, both (pairs,)."""
    ids, labels = _pad([pair.chosen for pair in batch] + [pair.rejected for pair in batch])
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none").sum(1)
    chosen, rejected = (-losses).chunk(2)
    return chosen, rejected


def _pad(batch: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Return ids and labels, both (texts, longest), padded on the right."""
    longest = max(len(text.ids) for text in batch)
    ids = torch.tensor([text.ids + [0] * (longest - len(text.ids)) for text in batch])
    labels = torch.tensor([text.labels + [IGNORED] * (longest - len(text.labels)) for text in batch])
    return ids, labels
