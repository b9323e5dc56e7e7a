"""Greedy answers of a model to prompts, batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .errors import PeftNLSRError


def find_tokenizer(model: Any) -> Any:
    """The tokenizer of the model's base, from where the base was loaded.

    Raises:
        PeftNLSRError: it cannot be found; the text says what to pass instead.
    """
    from transformers import AutoTokenizer

    source = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise PeftNLSRError(
            f"no tokenizer found at {source!r}, from where the base model says it was loaded; pass tokenizer=..."
        ) from error


def pad_id(tokenizer: Any) -> int:
    """The id to pad with; any id works, as padding is masked."""
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(i for i in ids if i is not None)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
) -> list[tuple[int, ...]]:
    """The model's greedy answers, token ids up to and including its end of sequence, in the order of ``prompts``.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids, non-empty each.
        max_new_tokens: answers are cut there.
        progress: text of a progress bar; None for none.
    """
    device = next(model.parameters()).device
    padding = pad_id(tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding, eos_token_id=_ends(model, tokenizer)
    )
    answers: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in tqdm(batches, desc=progress, disable=progress is None, leave=False):
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[padding] * (longest - len(prompts[i])) + list(prompts[i]) for i in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for i, row in zip(batch, out[:, longest:].tolist(), strict=True):
            answers[i] = _until_end(row, settings.eos_token_id)
    return [answers[i] for i in range(len(prompts))]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = known if isinstance(known, list) else [known]
    return sorted({e for e in [*ends, getattr(tokenizer, "eos_token_id", None)] if e is not None})


def _until_end(row: list[int], ends: Any) -> tuple[int, ...]:
    stops = [i for i, token in enumerate(row) if token in ends]
    return tuple(row[: stops[0] + 1] if stops else row)
