"""Greedy answers of a model to prompts, batched.

Greedy means greedy: the model's own generation settings are out of the way, and are put back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .errors import PeftNLSRError
from .examples import cut_by_length
from .offloading import at_hand, input_device
from .ranks import ALONE, Ranks


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
    """The id to pad with, 0 without a tokenizer; any id works, as padding is masked."""
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(i for i in ids if i is not None)


def positions_of(model: Any) -> int | None:
    """How many tokens the model is configured for; None where its configuration does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def has_room(model: Any, tokens: int) -> bool:
    """Whether the model has positions for so many tokens."""
    positions = positions_of(model)
    return positions is None or tokens <= positions


def require_positions(model: Any, tokens: int) -> None:
    """Check that an example, or a prompt and its answer, has room in the model; past it some models fail, deep inside.

    Raises:
        PeftNLSRError: the model is configured for fewer positions.
    """
    if not has_room(model, tokens):
        raise PeftNLSRError(
            f"an example needs {tokens} tokens with its answer, the model has {positions_of(model)} positions; set "
            "max_length lower, by as much as an answer may have (answer_tokens)"
        )


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
    ranks: Ranks = ALONE,
) -> list[tuple[int, ...]]:
    """The model's greedy answers, token ids up to and including its end of sequence, in the order of ``prompts``.

    Arguments are those of :func:`answers_in_batches`. Over several ranks each answers its share of the batches, and
    all get all answers.
    """
    own: dict[int, tuple[int, ...]] = {}
    for found in answers_in_batches(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress, ranks=ranks
    ):
        own |= found
    answers = {i: answer for part in ranks.gather(own) for i, answer in part.items()}
    return [answers[i] for i in range(len(prompts))]


def answers_in_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[dict[int, tuple[int, ...]]]:
    """The greedy answers of one batch after the other, by position in ``prompts``.

    Prompts of similar length share a batch, the longest come first (so that a lack of memory shows at once and the
    time left is never underestimated), and equal prompts are asked once. A batch holds ``batch_size`` prompts, or more
    where prompt and answer together are short (:func:`peft_nlsr.examples.cut_by_length`). The model's own generation
    settings, a repetition penalty for example, have no part in it.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids, non-empty each.
        max_new_tokens: answers are cut there.
        progress: text of a progress bar; None for none.
        ranks: of the batches only this rank's share is answered.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=end_ids(model, tokenizer),
    )
    positions: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        positions.setdefault(tuple(prompt), []).append(i)
    order = sorted(positions, key=len, reverse=True)
    require_positions(model, max(map(len, order), default=0) + max_new_tokens)
    batches = ranks.own(cut_by_length(order, [len(prompt) + max_new_tokens for prompt in order], batch_size))
    total = sum(len(positions[prompt]) for batch in batches for prompt in batch)
    with tqdm(total=total, desc=progress, disable=progress is None, leave=False, unit="answer") as bar:
        for batch in batches:
            answers = _answer(model, batch, settings)
            found = {i: answer for prompt, answer in zip(batch, answers, strict=True) for i in positions[prompt]}
            bar.update(len(found))
            yield found


def _answer(model: Any, batch: Sequence[tuple[int, ...]], settings: GenerationConfig) -> list[tuple[int, ...]]:
    """The answers to one batch, padded on the left."""
    device = input_device(model)
    longest = max(map(len, batch))
    ids = torch.full((len(batch), longest), settings.pad_token_id)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, prompt in enumerate(batch):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
    with torch.no_grad(), _without_own_settings(model):
        out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
    return [_until_end(row, settings.eos_token_id) for row in out[:, longest:].tolist()]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Inside, what the model's generation config holds (penalties, beams, banned words) is not filled in."""
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [module.generation_config for module in owners]
    try:
        for module in owners:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in zip(owners, kept, strict=True):
            module.generation_config = config


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Eval mode, and afterwards the modes and gradient flags as they were."""
    modes = {module: module.training for module in model.modules()}
    # By name, because accelerate makes new parameters in each pass of a module that it offloads.
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(flags[name])


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """As :func:`quiet`, and without gradients."""
    with quiet(model), torch.no_grad():
        yield


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, of the model's generation config and of the tokenizer."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = known if isinstance(known, list) else [known]
    return sorted({e for e in [*ends, getattr(tokenizer, "eos_token_id", None)] if e is not None})


def _until_end(row: list[int], ends: Any) -> tuple[int, ...]:
    stops = [i for i, token in enumerate(row) if token in ends]
    return tuple(row[: stops[0] + 1] if stops else row)


def model_digest(model: Any) -> str:
    """A SHA-256 that tells models apart by what they compute: samples of every tensor, and which adapters are active.

    At most 8,191 values of a tensor are hashed, so that it takes seconds, or as long as one forward pass where tensors
    are offloaded. Where they are has no influence; tensors without values anywhere count by name and shape.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            digest.update(_sampled_bytes(model, name, tensor))
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):
            digest.update(f"{name} {module.active_adapters} {module.disable_adapters}".encode())
    return digest.hexdigest()


def _sampled_bytes(model: Any, name: str, tensor: torch.Tensor) -> bytes:
    """Values of a tensor of the model's state, read through accelerate's hook where it is offloaded."""
    if not tensor.is_meta:
        return _bytes_of(tensor)
    path, _, own_name = name.rpartition(".")
    module = model.get_submodule(path)
    with at_hand(module):
        return _bytes_of(getattr(module, own_name, tensor))


def _bytes_of(tensor: torch.Tensor) -> bytes:
    """Evenly spaced values; none of a tensor without values."""
    if tensor.is_meta:
        return b""
    values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 4096)]
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
