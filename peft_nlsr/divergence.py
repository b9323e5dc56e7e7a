"""How far a model's next-token predictions moved from those of another one, on fixed benign text.

The other model need not be at hand any more: its most likely tokens are kept at every position, not its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import IncompatibleError
from .examples import Example, batches_of, collate
from .offloading import input_device


@dataclass(frozen=True)
class Baseline:
    """Predictions of one model for every answer token of fixed examples.

    Attributes:
        label: of the model.
        ids: of the prompts, one per example.
        examples: prompts and answers, tokenised.
        top_ids: per example the k most likely tokens at each answer position, ``(answer tokens, k)``.
        top_log_probs: their log-probabilities, same shape, float64.
    """

    label: str
    ids: tuple[str, ...]
    examples: tuple[Example, ...]
    top_ids: tuple[Tensor, ...]
    top_log_probs: tuple[Tensor, ...]


def predictions(
    model: Any,
    examples: Sequence[Example],
    *,
    ids: Sequence[str],
    label: str,
    top_k: int,
    batch_size: int,
    padding: int,
) -> Baseline:
    """The model's predictions on the examples; ``top_k`` is cut to the vocabulary's size."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for i, log_probs in _log_probs(model, examples, batch_size, padding):
        top = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)
        found[i] = (top.indices.cpu(), top.values.cpu())
    kept = [found[i] for i in range(len(examples))]
    return Baseline(label, tuple(ids), tuple(examples), tuple(t[0] for t in kept), tuple(t[1] for t in kept))


def divergences(
    model: Any, baseline: Baseline, *, batch_size: int, padding: int
) -> tuple[dict[str, float], dict[str, float]]:
    """By prompt id, in nats per answer token: the KL divergence from the baseline, and the model's own loss.

    The divergence is ``KL(baseline || model)`` where all tokens but the baseline's k most likely ones count as one: a
    lower bound of the full one, equal to it when k is the vocabulary's size.

    Raises:
        IncompatibleError: the model's vocabulary does not hold the baseline's tokens.
    """
    _require_vocabulary(model, baseline)
    kl: dict[str, float] = {}
    loss: dict[str, float] = {}
    for i, log_probs in _log_probs(model, baseline.examples, batch_size, padding):
        top_ids = baseline.top_ids[i].to(log_probs.device)
        answer = torch.tensor(_predicted(baseline.examples[i]), device=log_probs.device)
        kl[baseline.ids[i]] = _divergence(baseline.top_log_probs[i].to(log_probs), log_probs.gather(-1, top_ids))
        loss[baseline.ids[i]] = float(-log_probs.gather(-1, answer[:, None]).mean())
    return {i: kl[i] for i in baseline.ids}, {i: loss[i] for i in baseline.ids}


def _require_vocabulary(model: Any, baseline: Baseline) -> None:
    known = model.get_input_embeddings().num_embeddings
    largest = max(max(max(e.tokens) for e in baseline.examples), max(int(ids.max()) for ids in baseline.top_ids))
    if largest >= known:
        raise IncompatibleError(
            f"baseline {baseline.label!r} has a token {largest}, the model knows {known} tokens; collect the baseline "
            "from a model with the same vocabulary"
        )


def _divergence(p: Tensor, q: Tensor) -> float:
    """Mean over positions of the divergence of log-probabilities ``(tokens, k)``, the rest as one more outcome."""
    rest_p, rest_q = (1 - x.exp().sum(dim=-1, keepdim=True) for x in (p, q))
    smallest = torch.finfo(p.dtype).eps
    tail = torch.where(rest_p > smallest, rest_p * (rest_p / rest_q.clamp_min(smallest)).clamp_min(smallest).log(), 0)
    return max(0.0, float(((p.exp() * (p - q)).sum(dim=-1, keepdim=True) + tail).mean()))


def _log_probs(model: Any, examples: Sequence[Example], batch_size: int, padding: int) -> Iterator[tuple[int, Tensor]]:
    """Position and log-probabilities ``(answer tokens, vocabulary)`` in float64 of each example."""
    device = input_device(model)
    positions = {id(example): i for i, example in enumerate(examples)}
    for batch in batches_of(examples, batch_size):
        inputs = collate(batch, padding, device)
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        for row, example in enumerate(batch):
            end = len(example.tokens)
            answer = logits[row, end - len(_predicted(example)) - 1 : end - 1]
            yield positions[id(example)], answer.double().log_softmax(dim=-1)


def _predicted(example: Example) -> tuple[int, ...]:
    """The answer tokens that something comes before."""
    return example.answer if example.prompt else example.answer[1:]
