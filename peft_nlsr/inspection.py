"""Why safety dropped: how far an adapter drifted from its reference, which blocks matter, and which data did it.

Nothing is changed: blocks are exchanged only while a model is asked, and data come back as row numbers, not texts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter_folder import open_adapter
from .adapters import Adapter
from .blocks import as_teacher, find_blocks, playing, require_active
from .evaluation import Evaluation, Measurement
from .examples import Example, read_examples
from .files import write_json
from .generation import find_tokenizer, generate_answers, has_room, quiet
from .intervals import wilson
from .judges import Judge, judge_name, refuses, verdicts_of
from .live_adapter import LiveAdapter
from .lowrank import LowRank, add
from .measuring import EvaluationSettings
from .plots import restored_blocks
from .reference import Lineage, Reference, read_reference
from .report import say_interval, say_value

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModuleDrift:
    """One module against the reference.

    Attributes:
        module: its name.
        norm: ``|dW_t|``.
        reference_norm: ``|dW_e|``; 0 for the base model.
        distance: ``|dW_t - dW_e|``.
        cosine: between ``dW_t`` and ``dW_e``; None where either is zero.
        relative_change: ``distance / reference_norm``; None where that is zero.
        output_share: share of ``|dW_t|^2`` that lies in the reference's output directions; None where either is zero.
    """

    module: str
    norm: float
    reference_norm: float
    distance: float
    cosine: float | None
    relative_change: float | None
    output_share: float | None

    @classmethod
    def of(cls, module: str, tuned: LowRank, safe: LowRank | None) -> ModuleDrift:
        """The drift of one module, computed on the CPU in float64; ``safe`` None is a zero reference."""
        tuned, safe = _wide(tuned), None if safe is None else _wide(safe)
        norm, reference_norm = tuned.norm(), 0.0 if safe is None else safe.norm()
        if safe is None or reference_norm == 0.0:
            return cls(module, norm, 0.0, norm, None, None, None)
        distance = add([tuned, safe.times(-1.0)]).norm()
        share = _output_share(tuned, safe) if norm > 0.0 else None
        cosine = tuned.cosine(safe) if norm > 0.0 else None
        return cls(module, norm, reference_norm, distance, cosine, distance / reference_norm, share)


@dataclass(frozen=True)
class Inspection:
    """What is known about an adapter's drift.

    Attributes:
        reference: what it was compared with, one clause.
        lineage: "shared" (trained from the reference's factors), "independent", or "none" (the base model).
        factor_similarity: median cosine between the A factors; None without a reference adapter.
        unrelated: modules whose factors are unrelated to the reference's; more than a tenth make the lineage
            independent.
        modules: one per LoRA module, in order.
        blocks: label -> evaluation with one block's update replaced by the safe teacher's; first "fine-tuned" (none
            replaced), last "safe teacher" (all); empty when nothing was asked.
        outside: trained tensors that are not LoRA pairs and were not compared.
    """

    reference: str
    lineage: str
    factor_similarity: float | None
    unrelated: tuple[str, ...]
    modules: tuple[ModuleDrift, ...]
    blocks: dict[str, Evaluation]
    outside: tuple[str, ...]

    def restored(self, metric: str = "harm_rate") -> dict[str, Measurement]:
        """Block -> the rate with only that block restored."""
        inner = list(self.blocks)[1:-1]
        return {name: self.blocks[name].rates[metric] for name in inner}

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            **{key: getattr(self, key) for key in ("reference", "lineage", "factor_similarity")},
            "unrelated": list(self.unrelated),
            "modules": [asdict(module) for module in self.modules],
            "blocks": [evaluation.to_dict() for evaluation in self.blocks.values()],  # their labels say which
            "outside": list(self.outside),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the inspection to a JSON file; returns its path."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    def to_markdown(self) -> str:
        """Two tables, the modules by relative change (or norm, without a reference adapter) and the blocks."""
        ordered = sorted(self.modules, key=lambda m: -(m.norm if m.relative_change is None else m.relative_change))
        table = [["module", "norm", "reference", "cosine", "relative change", "in its directions"]]
        table += [["---", *["--:"] * 5]]
        for m in ordered:
            numbers = (m.norm, m.reference_norm, m.cosine, m.relative_change, m.output_share)
            table.append([m.module, *("-" if number is None else f"{number:.3f}" for number in numbers)])
        blocks = [["restored", "harm rate"], ["---", "--:"]] if self.blocks else []
        for name, evaluation in self.blocks.items():
            harm = evaluation.rates["harm_rate"]
            blocks.append([name, f"{say_value(harm)} ({say_interval(harm)})"])
        parts = ["\n".join(f"| {' | '.join(row)} |" for row in part) for part in (table, blocks) if part]
        return "\n\n".join([f"{self.reference}; lineage: {self.lineage}", *parts])

    def figure(self) -> Any:
        """Harm rate with each block restored, between those of the fine-tuned model and of the safe teacher.

        Raises:
            ValueError: no block was measured.
        """
        if not self.blocks:
            raise ValueError(
                "no block was measured; inspect a model in memory with evaluation=EvaluationSettings(...)"
            )
        first, *_, last = self.blocks.values()
        return restored_blocks(self.restored(), before=first.rates["harm_rate"], teacher=last.rates["harm_rate"])


def inspect_adapter(
    adapter: Any,
    reference: Any = None,
    *,
    evaluation: EvaluationSettings | None = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    progress: bool = True,
) -> Inspection:
    """How a fine-tuned adapter differs from a reference and, on a model, which block's restoration helps most.

    Args:
        adapter: a model in memory, a folder, a Hub id or a mapping module -> LowRank.
        reference: what is safe, see :func:`peft_nlsr.nlsr_realign`; None is the base model.
        evaluation: with a model in memory, safety prompts to ask with one block after the other restored. None asks
            nothing.
        tokenizer: found from the base model's name when None.
        adapter_name: which adapter of a model.

    Raises:
        IncompatibleError: the reference has other modules or shapes, or another base model.
        ValueError: prompts without a model to ask, or none of kind "safety".
    """
    opened = adapter if isinstance(adapter, Mapping) else open_adapter(adapter, adapter_name=adapter_name)
    source = read_reference(reference, opened)
    modules = tuple(
        ModuleDrift.of(name, update, None if source.updates is None else source.updates[name])
        for name, update in opened.items()
    )
    lineage = None if source.updates is None else Lineage.of(opened, source.updates)
    blocks: dict[str, Evaluation] = {}
    if evaluation is not None:
        if not isinstance(opened, LiveAdapter):
            raise ValueError("prompts were given, but the adapter is on no model; load it with PeftModel")
        if not any(prompts.kind == "safety" for prompts in evaluation.sets()):
            raise ValueError("the blocks are judged by safety prompts, found no prompt set of that kind")
        blocks = _curve(opened, source, evaluation, tokenizer, progress)
    outside = opened.info.outside if isinstance(opened, Adapter) else ()
    return Inspection(source.description, *_said(lineage), modules, blocks, outside)


def _said(lineage: Lineage | None) -> tuple[str, float | None, tuple[str, ...]]:
    """Name, median cosine and unrelated modules."""
    if lineage is None:
        return "none", None, ()
    return "shared" if lineage.shared else "independent", lineage.similarity, lineage.unrelated


def _wide(update: LowRank) -> LowRank:
    """On one device, and precise enough for the difference of updates that are nearly equal."""
    return LowRank(update.A.to("cpu", torch.float64), update.B.to("cpu", torch.float64), update.scale)


def _output_share(tuned: LowRank, safe: LowRank) -> float:
    """``|U U^T dW_t|^2 / |dW_t|^2`` with U an orthonormal basis of the columns of the reference's B."""
    U, S, _ = torch.linalg.svd(safe.B, full_matrices=False)
    U = U[:, S > S.max() * 1e-6]
    inside = LowRank(tuned.A, U @ (U.T @ tuned.B), tuned.scale)
    return min(1.0, (inside.norm() / tuned.norm()) ** 2)


def _curve(
    adapter: LiveAdapter, source: Reference, evaluation: EvaluationSettings, tokenizer: Any, progress: bool
) -> dict[str, Evaluation]:
    """Evaluations of the fine-tuned model, with each block restored alone, and of the safe teacher."""
    require_active(adapter)
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(adapter.model)
    names = {id(layer): name for name, layer in adapter.layers.items()}

    def asked(label: str) -> Evaluation:
        return evaluation.evaluate(adapter.model, tokenizer, label, progress=progress)

    found = {"fine-tuned": asked("fine-tuned")}
    for path, block in find_blocks(adapter):
        label = path.removeprefix("base_model.model.")
        inside = [names[id(module)] for module in block.modules() if id(module) in names]
        if inside:
            with playing(adapter, dict.fromkeys(inside), source.updates):
                found[label] = asked(label)
    with as_teacher(adapter, source.updates):
        found["safe teacher"] = asked("safe teacher")
    return found


@dataclass(frozen=True)
class SourceShare:
    """What was refused of one source: rows asked, rows refused, their share and its 95% interval."""

    asked: int
    refused: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, refused: int, asked: int) -> SourceShare:
        """The share of counts, of at least one row."""
        return cls(asked, refused, refused / asked, *wilson(refused / asked, asked))


@dataclass(frozen=True)
class Audit:
    """Which rows of a data set the aligned model refuses; numbers only.

    Attributes:
        total: over all rows that have a prompt.
        refused_rows: positions of the refused rows in the data, sorted.
        sources: value of the source column -> share; empty without a source column.
        unasked_rows: positions of rows that could not be asked: without a prompt (plain text), without tokens, or
            without room for an answer in the model's positions.
        judge: what called an answer a refusal.
        teacher: who was asked.
    """

    total: SourceShare
    refused_rows: tuple[int, ...]
    sources: dict[str, SourceShare]
    unasked_rows: tuple[int, ...]
    judge: str
    teacher: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        lists = {key: list(getattr(self, key)) for key in ("refused_rows", "unasked_rows")}
        return {"schema_version": SCHEMA_VERSION, **asdict(self), **lists}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the audit to a JSON file; returns its path."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    def to_markdown(self) -> str:
        """Counts and shares per source, and in all."""
        lines = [["source", "asked", "refused", "share"], ["---", "--:", "--:", "--:"]]
        for name, part in [*self.sources.items(), ("all", self.total)]:
            share = f"{100 * part.share:.1f}% ({100 * part.low:.1f} to {100 * part.high:.1f}%)"
            lines.append([name, str(part.asked), str(part.refused), share])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def audit(
    model: Any,
    data: Iterable[Any],
    *,
    reference: Any = None,
    tokenizer: Any = None,
    judge: Judge = refuses,
    source: str | None = None,
    limit: int | None = None,
    max_length: int = 512,
    answer_tokens: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    adapter_name: str | None = None,
    progress: bool = True,
) -> Audit:
    """Ask an aligned model every prompt of a training set, and count what it refuses; the model is left as it was.

    Args:
        model: an aligned model, or a PeftModel whose base (or ``reference``) is the aligned one.
        data: rows as :func:`peft_nlsr.examples.read_examples` takes them. Of a batch or a packed row every example is
            asked; it counts as one row, which is refused where one of its examples is.
        reference: the safe adapter; only with a PeftModel.
        tokenizer: found from the model's name when None.
        judge: which answers are refusals.
        source: column of the rows that says where each comes from; shares are given for each of its values.
        limit: rows that are asked, drawn with ``seed``; all when None.
        max_length: longer prompts are cut on the right.
        answer_tokens: greedy tokens of each answer, enough to open a refusal.

    Raises:
        ValueError: rows without the source column, no row with a prompt, or a reference without an adapter.
    """
    rows = list(data)
    if source is not None:
        _require_column(rows, source)
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(model)
    drawn = _drawn(len(rows), limit, seed)
    prompted = _with_prompt(rows, drawn, tokenizer, max_length)
    asked = [example for example in prompted if has_room(model, len(example.prompt) + answer_tokens)]
    if not asked:
        why = ", and room for an answer in the model's positions; lower answer_tokens" if prompted else ""
        raise ValueError(f"no row has a prompt to ask{why}; give rows with a prompt and a response, or chat messages")
    with _teaching(model, reference, adapter_name) as (teacher, said):
        answers = generate_answers(
            teacher,
            tokenizer,
            [example.prompt for example in asked],
            max_new_tokens=answer_tokens,
            batch_size=batch_size,
            progress="aligned model reads the data" if progress else None,
        )
    refused = _refused(asked, answers, tokenizer, judge)
    return Audit(
        total=SourceShare.of(len(refused), len({example.index for example in asked})),
        refused_rows=tuple(sorted(refused)),
        sources={} if source is None else _by_source(rows, asked, refused, source),
        unasked_rows=tuple(sorted(set(drawn) - {e.index for e in asked})),
        judge=judge_name(judge),
        teacher=said,
    )


def _drawn(count: int, limit: int | None, seed: int) -> list[int]:
    """Positions of the rows to ask."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order if limit is None else order[:limit]


def _with_prompt(rows: list[Any], drawn: list[int], tokenizer: Any, max_length: int) -> list[Example]:
    """All examples of the drawn rows that have a prompt, with the positions of their rows."""
    chosen = [replace(rows[i], index=-1) if isinstance(rows[i], Example) else rows[i] for i in drawn]
    examples = read_examples(chosen, tokenizer, limit=sys.maxsize, max_length=max_length)
    return [replace(example, index=drawn[example.index]) for example in examples if example.prompt]


@contextmanager
def _teaching(model: Any, reference: Any, adapter_name: str | None) -> Iterator[tuple[nn.Module, str]]:
    """The model while it is the safe teacher, in eval mode without gradients."""
    if not getattr(model, "peft_config", None):
        if reference is not None:
            raise ValueError("a reference goes with a PeftModel; put it on the model, or audit with the model alone")
        with quiet(model), torch.no_grad():
            yield model, "the model as it was given"
        return
    adapter = LiveAdapter(model, adapter_name)
    teacher = read_reference(reference, adapter)
    with quiet(adapter.model), torch.no_grad(), as_teacher(adapter, teacher.updates):
        yield adapter.model, teacher.description


def _refused(asked: list[Example], answers: list[tuple[int, ...]], tokenizer: Any, judge: Judge) -> set[int]:
    prompts = [tokenizer.decode(example.prompt, skip_special_tokens=True) for example in asked]
    replies = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    verdicts = verdicts_of(judge, prompts, replies)
    return {example.index for example, verdict in zip(asked, verdicts, strict=True) if verdict}


def _require_column(rows: list[Any], column: str) -> None:
    missing = [i for i, row in enumerate(rows) if not isinstance(row, Mapping) or column not in row]
    if missing:
        raise ValueError(f"{len(missing)} of {len(rows)} rows have no column {column!r}, first row {missing[0]}")


def _by_source(rows: list[Any], asked: list[Example], refused: set[int], column: str) -> dict[str, SourceShare]:
    groups: dict[str, set[int]] = {}
    for index in {example.index for example in asked}:
        groups.setdefault(str(rows[index][column]), set()).add(index)
    return {name: SourceShare.of(len(group & refused), len(group)) for name, group in sorted(groups.items())}
