"""Training and calibration data in the shapes people have it, as one small type: prompt tokens and answer tokens."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from .config import NLSRConfig
from .errors import CalibrationError, PeftNLSRError

logger = logging.getLogger(__name__)

ACCEPTED = (
    "{'prompt', 'response'} or {'prompt', 'completion'} (text or chat messages), {'messages'}, {'text'}, tokenised "
    "{'input_ids', 'labels'} or {'prompt_ids', 'completion_ids'} rows, or collated batches, padded or packed"
)
SHORT = 64  # tokens; a forward pass with fewer per example is cheap, so that it takes more examples
_IGNORED = -100
_LEAST_ROWS, _ROWS_PER_EXAMPLE = 10_000, 100  # how far a stream is read for examples, because it may have no end
_COMPLETION = ("completion", "completion_ids", "completion_mask")
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "labels", "completion_mask", "assistant_masks")

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        prompt: token ids up to the point where the answer begins; empty for plain text.
        answer: token ids of the answer, end-of-sequence included; empty when nobody has answered yet.
        index: position of the row in the caller's data; -1 for examples made here.
        refusal: of a safety example: True where the answer is a refusal, False where it is none and the safe teacher
            does not refuse the prompt either, None where neither is known.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    index: int = -1
    refusal: bool | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt + self.answer


def read_examples(data: Iterable[Any], tokenizer: Any, *, limit: int, max_length: int, seed: int = 0) -> list[Example]:
    """At most ``limit`` examples of ``data``, tokenised and cut to ``max_length`` tokens.

    Args:
        data: a list, ``datasets.Dataset``, data loader or other iterable of rows; see the error text for their forms.
        tokenizer: its chat template is used when it has one; None is fine for data that are tokenised already.
        limit: data with a length are sampled with ``seed``; of the others the first ``limit`` examples are taken, from
            at most ``100 limit`` rows, or 10,000 where that is more.
        max_length: longer examples are cut on the right. Where the cut falls into the prompt nothing can be asked, so
            that what is left counts as plain text; a warning says how many there are. Completions with
            ``label=False`` (KTO) are not wanted and are left out, with a warning too.

    Raises:
        CalibrationError: no rows, no usable tokens, or a row of unknown form.
    """
    found: list[Example] = []
    cut, unwanted, taken, most = 0, 0, 0, min(max(_LEAST_ROWS, _ROWS_PER_EXAMPLE * limit), sys.maxsize)
    for index, given in _rows(data, most, seed):
        row, left_out = _wanted(given)
        read = [] if row is None else [e for e in _examples_of(row, tokenizer, index) if e.tokens]
        taken, unwanted = taken + 1, unwanted + left_out
        cut += sum(len(e.prompt) > max_length for e in read)
        found += [_shortened(e, max_length, index) for e in read]
        if len(found) >= limit:
            break
    _warn_of(cut, unwanted, max_length)
    if len(found) < limit and taken == most and not _has_positions(data):
        _tell_of_end(len(found), most)
    if not found:
        raise CalibrationError(f"the data hold no examples with tokens; give an iterable of {ACCEPTED}")
    return found[:limit]


def _tell_of_end(found: int, most: int) -> None:
    if not found:
        raise CalibrationError(
            f"no example with tokens in the first {most} rows, and no more are read of data without a length; give an "
            f"iterable of {ACCEPTED}, the usable rows first"
        )
    logger.warning("%d examples in the first %d rows; no more are read of data without a length", found, most)


def _warn_of(cut: int, unwanted: int, max_length: int) -> None:
    if cut:
        logger.warning(
            "%d examples have prompts longer than max_length=%d: they count as plain text and are not asked; raise "
            "max_length to use them",
            *(cut, max_length),
        )
    if unwanted:
        logger.warning("%d completions with label=False are not what the model should say: left out", unwanted)


def _shortened(example: Example, length: int, index: int) -> Example:
    place = index if example.index < 0 else example.index
    if len(example.prompt) > length:
        return replace(example, prompt=(), answer=example.prompt[:length], index=place)
    return replace(example, answer=example.answer[: length - len(example.prompt)], index=place)


def _wanted(row: Any) -> tuple[Any, int]:
    """A row or batch without the completions that unpaired preference data (KTO) mark as undesirable, and how many
    these are; None where nothing is left."""
    marks = _marks(row)
    if marks is None or bool(marks.all()):
        return row, 0
    count = int((~marks).sum())
    if count == marks.numel():
        return None, count
    kept = {key: torch.as_tensor(row[key])[marks] for key in _PER_TOKEN if row.get(key) is not None}
    return kept, count


def _marks(row: Any) -> Tensor | None:
    """Which completions are desirable: one mark of a row, one per row of a batch; None where nothing is marked."""
    if not isinstance(row, Mapping) or not any(key in row for key in _COMPLETION):
        return None
    try:
        marks = torch.as_tensor(row.get("label"))
    except (TypeError, ValueError, RuntimeError):
        return None  # a label of another kind, which other data may have
    fits = marks.ndim == 0 or (marks.ndim == 1 and "input_ids" in row)
    return marks if marks.dtype == torch.bool and fits else None


def sample(data: Iterable[Any], tokenizer: Any, config: NLSRConfig, *, times: int = 1) -> list[Example]:
    """As many examples as the configuration asks for, or so many times as many; see :func:`read_examples`."""
    return read_examples(
        data, tokenizer, limit=times * config.max_samples, max_length=config.max_length, seed=config.nlsr_seed
    )


def _rows(data: Iterable[Any], most: int, seed: int) -> Iterator[tuple[int, Any]]:
    """Rows with their positions: all in the order of ``seed`` where data have a length, else at most ``most``."""
    if isinstance(data, Mapping | str) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise CalibrationError(f"the data are a single {type(data).__name__}; give an iterable of {ACCEPTED}")
    if _has_positions(data):
        sized: Any = data
        order = torch.randperm(len(sized), generator=torch.Generator().manual_seed(seed)).tolist()
        return ((i, _at(sized, i)) for i in order)
    return ((i, row) for i, row in enumerate(islice(data, most)))


def _has_positions(data: Any) -> bool:
    """Whether rows can be taken by position; torch gives iterable datasets a ``__getitem__`` that only raises."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def _at(data: Any, position: int) -> Any:
    try:
        return data[position]
    except KeyError as error:
        kind = type(data).__name__
        if hasattr(data, "iloc"):
            raise CalibrationError(
                f"a {kind} has no row {position} by position; give a list of rows, of a data frame "
                "df.to_dict('records')"
            ) from error
        missing = f"no key {error.args[0]!r}" if error.args else "a key missing"
        raise CalibrationError(
            f"row {position} of the {kind} cannot be made: it found {missing}; check the columns that its transform "
            "or collator reads, or give a list of rows"
        ) from error


def _examples_of(row: Any, tokenizer: Any, index: int) -> list[Example]:
    try:
        return list(_read_row(row, tokenizer, index))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"row {index} cannot be read ({type(error).__name__}: {error}); expected one of {ACCEPTED}"
        ) from error


def _read_row(row: Any, tokenizer: Any, index: int) -> Iterator[Example]:
    if isinstance(row, Example):
        yield row
        return
    if not isinstance(row, Mapping):
        raise CalibrationError(f"row {index} is a {type(row).__name__}, expected one of {ACCEPTED}")
    row = {key: value for key, value in row.items() if value is not None}  # as joined data sets fill their gaps
    if "prompt_ids" in row:
        answer = next((row[key] for key in ("completion_ids", "chosen_ids") if key in row), ())
        yield Example(_ids(row["prompt_ids"]), _ids(answer))
        return
    if "input_ids" in row:
        yield from _read_tokens(row, answer_marker(tokenizer))
        return
    if tokenizer is None:
        raise PeftNLSRError("text data need a tokenizer: pass tokenizer=... or give tokenised rows")
    answer = next((row[key] for key in ("response", "completion", "chosen") if key in row), None)
    if "messages" in row:
        yield _from_chat(list(row["messages"]), tokenizer, _template_options(row, tokenizer))
    elif "prompt" in row:
        turns = _messages(row["prompt"], "user") + _messages(answer, "assistant")
        yield _from_chat(turns, tokenizer, _template_options(row, tokenizer))
    elif "text" in row:
        ids = tuple(tokenizer(row["text"])["input_ids"])
        yield _split_at_answer(ids, list(range(len(ids))), answer_marker(tokenizer))
    else:
        held = f"the keys {sorted(map(str, row))}" if row else "no values"
        raise CalibrationError(f"row {index} has {held}, expected one of {ACCEPTED}")


def _ids(values: Any) -> tuple[int, ...]:
    """Token ids as plain numbers, also of an array or a tensor."""
    return tuple(values.tolist() if hasattr(values, "tolist") else values)


def _messages(content: Any, role: str) -> list[dict[str, str]]:
    if content is None:
        return []
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def _template_options(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """What a row gives to the chat template besides its turns, in the columns that TRL reads."""
    # TRL, too, reads these columns for conversations only, and nothing reads them without a template.
    if not getattr(tokenizer, "chat_template", None) or ("messages" not in row and isinstance(row["prompt"], str)):
        return {}
    more = row.get("chat_template_kwargs", {})
    if not isinstance(more, Mapping):
        raise ValueError(f"column 'chat_template_kwargs' is a {type(more).__name__}; give a mapping, or leave it out")
    tools = _tools(row.get("tools"))
    return {**({"tools": tools} if tools else {}), **more}


def _tools(column: Any) -> list[Any]:
    """The tools in a column, where they are a list or the JSON of one; empty where there are none."""
    try:
        found = json.loads(column) if isinstance(column, str) and column else column
    except json.JSONDecodeError as error:
        raise ValueError(
            f"column 'tools' is no JSON ({error}); give a list of tool schemas, or leave the column out"
        ) from error
    if found is None or (isinstance(found, Sized) and not len(found)):
        return []
    if isinstance(found, Mapping) or not isinstance(found, Iterable):
        raise ValueError(f"column 'tools' is a {type(found).__name__}; give a list of tool schemas, or leave it out")
    return list(found)


def _from_chat(messages: list[dict[str, str]], tokenizer: Any, options: dict[str, Any]) -> Example:
    """Prompt = everything before the last assistant turn; the answer is what the template adds for that turn."""
    if not messages:
        raise ValueError("it is an empty conversation")
    answered = messages[-1]["role"] == "assistant"
    before = messages[:-1] if answered else messages
    if not getattr(tokenizer, "chat_template", None):
        prompt = "\n".join(m["content"] for m in before)
        head = _without_end(tokenizer(prompt)["input_ids"], tokenizer)
        tail = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"] if answered else []
        end = [tokenizer.eos_token_id] if answered and tokenizer.eos_token_id is not None else []
        return Example(tuple(head), tuple(tail + end))
    prompt = _rendered(before, tokenizer, options, asking=True)
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not answered:
        return Example(tuple(head), ())
    whole = _rendered(messages, tokenizer, options, asking=False)
    tail = whole[len(prompt) :] if whole.startswith(prompt) else messages[-1]["content"] + (tokenizer.eos_token or "")
    return Example(tuple(head), tuple(_continued(head, prompt, tail, tokenizer)))


def _rendered(messages: list[dict[str, str]], tokenizer: Any, options: dict[str, Any], *, asking: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking, **options))
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses it: {error}") from error


def _continued(head: list[int], prompt: str, tail: str, tokenizer: Any) -> list[int]:
    """Ids of ``tail`` as they follow ``prompt`` (ids ``head``) in one text; on its own where the two would merge."""
    whole = tokenizer(prompt + tail, add_special_tokens=False)["input_ids"]
    if whole[: len(head)] == head:
        return list(whole[len(head) :])
    return list(tokenizer(tail, add_special_tokens=False)["input_ids"])


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if len(ids) > 1 and ids[-1] in ends else ids


def _read_tokens(row: Mapping[str, Any], marker: tuple[int, ...]) -> Iterator[Example]:
    """Tokenised rows and collated batches; packed ones are cut where the positions start again."""
    ids = torch.as_tensor(row["input_ids"])
    batch = ids if ids.ndim == 2 else ids.reshape(1, -1)
    keep = torch.as_tensor(row.get("attention_mask", torch.ones_like(batch))).reshape(batch.shape).bool()
    positions = torch.as_tensor(row.get("position_ids", torch.ones_like(batch))).reshape(batch.shape)
    for tokens, kept, wanted, place in zip(batch, keep, _labels(row, batch), positions, strict=True):
        starts = (place[kept] == 0).nonzero().flatten().tolist()
        cuts = [at for at in starts if at > 0]
        for piece, labels in zip(
            tokens[kept].tensor_split(cuts), (wanted[kept] != _IGNORED).tensor_split(cuts), strict=True
        ):
            yield _split_at_answer(tuple(piece.tolist()), labels.nonzero().flatten().tolist(), marker)


def _labels(row: Mapping[str, Any], batch: Tensor) -> Tensor:
    if "labels" in row:
        return torch.as_tensor(row["labels"]).reshape(batch.shape)
    mask = next((row[key] for key in ("completion_mask", "assistant_masks") if key in row), None)
    if mask is None:
        return batch
    return batch.masked_fill(~torch.as_tensor(mask).reshape(batch.shape).bool(), _IGNORED)


def _split_at_answer(ids: tuple[int, ...], counted: list[int], marker: tuple[int, ...]) -> Example:
    """The prompt is what comes before the first label that counts; where all count, what the chat template puts
    before the last answer."""
    if not counted:
        return Example(ids, ())
    # Packing without padding takes the label of each first token away, so 1 means the same as 0.
    if counted[0] <= 1 and marker:
        ends = [i + len(marker) for i in range(len(ids)) if ids[i : i + len(marker)] == marker]
        if ends:
            return Example(ids[: ends[-1]], ids[ends[-1] :])
    return Example(ids[: counted[0]], ids[counted[0] :])


def knows_words(texts: Sequence[str], tokenizer: Any) -> bool:
    """Whether the tokenizer knows at least four fifths of the texts' tokens; texts in another language are noise."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return unknown is None or ids.count(unknown) <= 0.2 * len(ids)


class CollatedRows(Sequence[Any]):
    """The rows of a data loader's dataset, each as the loader would collate it alone; preference rows as they are."""

    def __init__(self, loader: Any) -> None:
        self._dataset, self._collate = loader.dataset, loader.collate_fn

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return _alone(self._dataset[index], self._collate)


def loader_rows(loader: Any) -> Iterable[Any]:
    """What a data loader trains on, row by row, as :func:`read_examples` takes it.

    Row numbers are those of the dataset, whatever the loader's sampler and however many processes share it.
    """
    if _has_positions(loader.dataset):
        return CollatedRows(loader)
    return (_alone(row, loader.collate_fn) for row in loader.dataset)


def _alone(row: Any, collate_fn: Any) -> Any:
    return row if isinstance(row, Mapping) and "prompt_ids" in row else collate_fn([row])


def answer_marker(tokenizer: Any) -> tuple[int, ...]:
    """Token ids that a chat template puts between a request and its answer; empty without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return ()
    request, answer = "question", "reply"
    turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    before, _, after = _rendered(turns, tokenizer, {}, asking=False).partition(request)
    between = after.partition(answer)[0]
    with_request = tokenizer(before + request, add_special_tokens=False)["input_ids"]
    with_marker = tokenizer(before + request + between, add_special_tokens=False)["input_ids"]
    if with_marker[: len(with_request)] != with_request:
        return ()
    return tuple(with_marker[len(with_request) :])


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels`` (answer tokens), each ``(n, longest)``."""
    longest = max(len(e.tokens) for e in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), longest), -100)
    for i, example in enumerate(examples):
        tokens = torch.tensor(example.tokens)
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, len(example.prompt) : len(tokens)] = tokens[len(example.prompt) :]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def token_weights(examples: Sequence[Example], decision_weight: float) -> Tensor:
    """``(n, longest)``: 1 on every token, ``decision_weight`` on the last of each prompt, 0 on padding."""
    weights = torch.zeros(len(examples), max(len(e.tokens) for e in examples))
    for i, example in enumerate(examples):
        weights[i, : len(example.tokens)] = 1.0
        if example.prompt:
            weights[i, len(example.prompt) - 1] = decision_weight
    return weights


def batches_of(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Batches of similar length, longest first, so that little is spent on padding; their sizes are as in
    :func:`cut_by_length`."""
    ordered = sorted(examples, key=lambda e: -len(e.tokens))
    return cut_by_length(ordered, [len(e.tokens) for e in ordered], size)


def cut_by_length(items: Sequence[T], lengths: Sequence[int], size: int) -> list[list[T]]:
    """Consecutive batches of ``size`` items, or of more short ones, ``64 size`` tokens in all.

    Args:
        lengths: tokens of each item, falling, so that the first of a batch says how far the others are padded.
    """
    batches: list[list[T]] = []
    start = 0
    while start < len(items):
        count = max(size, size * SHORT // max(1, lengths[start]))
        batches.append(list(items[start : start + count]))
        start += count
    return batches


def collated(examples: Sequence[Example], size: int, pad_id: int) -> list[dict[str, Tensor]]:
    """The examples as collated batches of :func:`batches_of`, see :func:`collate`."""
    return [collate(batch, pad_id) for batch in batches_of(examples, size)]
