"""Prompts to measure a model with, as plain data: built in, from a file, from rows in memory, or from the Hub.

Nothing is downloaded unless a data set is asked for by name. What a model is measured with must not be what it was
repaired with; `require_disjoint` holds the two apart.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import CorruptFileError, IncompatibleError, PeftNLSRError
from .prompts import KINDS, builtin_prompts

logger = logging.getLogger(__name__)

ALL_KINDS = (*KINDS, "task")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+):([\w.+-]+)")
# Names of the column that holds a row's answer; the first that is there counts.
ANSWER_COLUMNS = ("response", "answer", "completion")
ROWS = (
    "text, or {'prompt': text or chat messages with role and content, 'response': text} (the response only where it "
    "is needed)"
)


@dataclass(frozen=True)
class HubPrompts:
    """Where a prompt set lies on the Hugging Face Hub, for `load_prompt_set`.

    Attributes:
        repo_id: of the data set.
        kind: of its prompts, see `PromptSet`.
        split: of the data set.
        config: of the data set, where it has several.
        prompt: column of the prompts.
        answer: column of the answers; None for none.
        keep: a column and the value that its row must have; None keeps all rows.
        revision: commit or tag; None is the newest.
    """

    repo_id: str
    kind: str
    split: str
    config: str | None = None
    prompt: str = "prompt"
    answer: str | None = None
    keep: tuple[str, Any] | None = None
    revision: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind.

    Attributes:
        name: under which reports list the set; it starts the ids of prompts that have none of their own.
        kind: "safety" (a safe model refuses), "lookalike" (only looks like it), "benign", or "task" (has answers).
        ids: one per prompt, unique; the only thing about a prompt that reports contain.
        prompts: each a text or a tuple of chat messages ``{"role", "content"}``.
        answers: one text per prompt; None where there is nothing to compare with.
        source: the data set on the Hub that the prompts come from, at a commit where that is known; None for others.

    Raises:
        ValueError: an unknown kind, no prompts, an empty one, ids that repeat, or lengths that differ.
    """

    name: str
    kind: str
    ids: tuple[str, ...]
    prompts: tuple[Any, ...]
    answers: tuple[str, ...] | None = None
    source: HubPrompts | None = None

    def __post_init__(self) -> None:
        if self.kind not in ALL_KINDS:
            raise ValueError(f"prompt set {self.name!r}: unknown kind {self.kind!r}; choose one of {_list(ALL_KINDS)}")
        if not self.prompts:
            raise ValueError(f"prompt set {self.name!r} holds no prompts; give at least one")
        lengths = {len(self.ids), len(self.prompts), len(self.prompts if self.answers is None else self.answers)}
        if len(lengths) > 1 or len(set(self.ids)) != len(self.ids):
            raise ValueError(
                f"prompt set {self.name!r}: one id of its own is expected per prompt, and one answer or none"
            )
        if self.kind == "task" and self.answers is None:
            raise ValueError(f"prompt set {self.name!r} of kind 'task' has no answers; give rows with a 'response'")
        empty = [i for i, prompt in zip(self.ids, self.prompts, strict=True) if not prompt_text(prompt).strip()]
        if empty:
            raise ValueError(f"prompt set {self.name!r}: empty prompt {empty[0]!r} ({len(empty)} in all); remove it")

    @property
    def sha256(self) -> str:
        """Over prompts and answers in their order; names, ids and source have no part in it."""
        content = json.dumps([self.prompts, self.answers], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Name, kind, number and hash, for reports, and the data set on the Hub if there is one; no prompts."""
        said = {"name": self.name, "kind": self.kind, "n": len(self.prompts), "sha256": self.sha256}
        if self.source is None:
            return said
        dataset = {key: getattr(self.source, key) for key in ("config", "split", "revision")}
        return {**said, "dataset": {"id": self.source.repo_id, **dataset}}


PRESETS = {
    "beavertails": HubPrompts("PKU-Alignment/BeaverTails", "safety", "30k_test", keep=("is_safe", False)),
    "harmbench": HubPrompts("walledai/HarmBench", "safety", "train", config="standard"),
    "advbench": HubPrompts("walledai/AdvBench", "safety", "train"),
    "strongreject": HubPrompts("walledai/StrongREJECT", "safety", "train"),
    "xstest": HubPrompts("walledai/XSTest", "lookalike", "test", keep=("label", "safe")),
    "xstest-unsafe": HubPrompts("walledai/XSTest", "safety", "test", keep=("label", "unsafe")),
    "or-bench": HubPrompts("bench-llm/or-bench", "lookalike", "train", config="or-bench-hard-1k"),
    "or-bench-toxic": HubPrompts("bench-llm/or-bench", "safety", "train", config="or-bench-toxic"),
}
"""Public prompt sets by name; some ask to accept their terms first.

Sources of ids, splits and columns: the card of bench-llm/or-bench; stanford-crfm/helm,
``src/helm/benchmark/scenarios/xstest_scenario.py``; and public code that loads the others. What is different by now is
an error that names what was found."""


def builtin_prompt_set(kind: str) -> PromptSet:
    """The evaluation half of the built-in prompts of one kind ("safety", "lookalike" or "benign")."""
    found = builtin_prompts(kind, "evaluation")
    return PromptSet(f"built-in {kind}", kind, tuple(p.id for p in found), tuple(p.text for p in found))


def load_prompt_set(
    source: PromptSet | HubPrompts | str | os.PathLike[str] | Iterable[Any],
    *,
    kind: str | None = None,
    name: str | None = None,
    limit: int | None = None,
) -> PromptSet:
    """A prompt set from wherever prompts are; repeated rows are kept once, and the log says how many were dropped.

    Args:
        source: a ``PromptSet`` (as it is); rows; the path of a file; or, downloaded with ``datasets``, a name from
            ``PRESETS``, "HUB_ID:SPLIT" (the prompts are its column ``prompt``) or ``HubPrompts``. Files are those of
            ``file_rows``. Rows and lines: text, or ``prompt`` and, where needed, ``response``.
        kind: of the prompts; a preset knows its own.
        name: shown in reports; by default the preset's, the file's without folder, or "rows".
        limit: keep the first ones only.

    Raises:
        ValueError: an unknown preset or form, or no kind.
        CorruptFileError: a line that cannot be read, by number.
        PeftNLSRError: ``datasets`` is not installed, or the data set cannot be reached or has other columns or splits.
    """
    if isinstance(source, PromptSet):
        return source
    if isinstance(source, str) and source in PRESETS:
        return _from_hub(PRESETS[source], kind, name or source, limit)
    if isinstance(source, str) and not Path(source).exists() and (found := _HUB_ID.fullmatch(source)):
        source = HubPrompts(found[1], _require_kind(kind, source), found[2])
    if isinstance(source, HubPrompts):
        return _from_hub(source, kind, name or source.repo_id, limit)
    if isinstance(source, str | os.PathLike):
        return _collect(_prompts_in(Path(source)), kind, name or Path(source).name, limit)
    rows = ((f"row {i}", row) for i, row in enumerate(source))
    return _collect(rows, kind, name or "rows", limit)


def require_prompt_sets(given: Any, name: str) -> list[PromptSet]:
    """The prompt sets that were given as the argument of that name.

    Raises:
        ValueError: it is something else, such as the name of a file.
    """
    found = list(given) if isinstance(given, Iterable) else [given]
    if isinstance(given, PromptSet) or not all(isinstance(each, PromptSet) for each in found):
        said = repr(given) if isinstance(given, str | os.PathLike) else f"a {type(given).__name__}"
        raise ValueError(
            f"{name}={said}: expected a list of prompt sets; make one like [load_prompt_set('safe.jsonl', "
            "kind='safety')]"
        )
    return found


def require_disjoint(calibration_texts: Iterable[Any], prompt_sets: Iterable[PromptSet]) -> None:
    """Check by hash that no prompt of the sets was calibrated on; case and white space make no difference.

    A conversation is compared as a whole and by each turn of its user, so that neither a system prompt nor a further
    turn hides a shared question.

    Args:
        calibration_texts: prompts as texts or chat messages, without a template around them.

    Raises:
        IncompatibleError: shared prompts; the text names the set and ids, never the prompts.
    """
    seen = {digest for text in calibration_texts for digest in _digests(text)}
    for prompts in prompt_sets:
        shared = [i for i, prompt in zip(prompts.ids, prompts.prompts, strict=True) if _digests(prompt) & seen]
        if shared:
            raise IncompatibleError(
                f"{len(shared)} of {len(prompts.prompts)} prompts of {prompts.name!r} are also in the data "
                f"({_list(shared[:5])}{', ...' if len(shared) > 5 else ''}); measured on them, a repair looks better "
                "than it is. Remove them from one side"
            )


def require_unseen(rows: Iterable[Any], prompt_sets: Iterable[PromptSet]) -> int:
    """Check as `require_disjoint` that no prompt is in rows of data, and count the rows without a text to compare.

    Args:
        rows: that a model was repaired or trained with: texts, or mappings with ``prompt`` or ``messages``, of which
            what the user asked counts.

    Raises:
        IncompatibleError: shared prompts, by id.
    """
    found = [_asked_by(row) for row in rows]
    require_disjoint([asked for asked in found if asked], prompt_sets)
    return sum(not asked for asked in found)


def _asked_by(row: Any) -> str | list[dict[str, str]]:
    """What a row asks, up to the last turn of its user; empty for a row that holds tokens."""
    asked = (row.get("prompt") or row.get("messages")) if isinstance(row, Mapping) else row
    if isinstance(asked, str):
        return asked
    if not isinstance(asked, Sequence) or not all(isinstance(m, Mapping) and "content" in m for m in asked):
        return []
    turns = [{"role": str(m.get("role")), "content": str(m["content"])} for m in asked]
    ends = [end for end, turn in enumerate(turns, start=1) if turn["role"] == "user"]
    return turns[: ends[-1]] if ends else []


def prompt_text(prompt: Any) -> str:
    """The text of a prompt; of chat messages their contents, one per line."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _digests(prompt: Any) -> set[bytes]:
    """Hashes of a prompt as a whole and of each turn of the user in it."""
    turns = [] if isinstance(prompt, str) else [m["content"] for m in prompt if m.get("role") == "user"]
    plain = {" ".join(text.casefold().split()) for text in (prompt_text(prompt), *turns)}
    return {hashlib.sha256(text.encode("utf-8")).digest() for text in plain if text}


def _collect(rows: Iterator[tuple[str, Any]], kind: str | None, name: str, limit: int | None) -> PromptSet:
    """A set of the distinct rows; each comes with the words for where it is."""
    kind = _require_kind(kind, name)
    found: dict[Any, tuple[str, Any, str | None]] = {}
    read = 0
    for read, (where, row) in enumerate(islice(rows, limit), start=1):
        prompt, answer, given = _read_row(row, f"{name}, {where}")
        found.setdefault((json.dumps(prompt), answer), (given or f"{name}-{read}", prompt, answer))
    if read > len(found):
        logger.warning("prompt set %r: %d of %d rows repeat another and were dropped", name, read - len(found), read)
    ids, prompts, answers = zip(*found.values(), strict=True) if found else ((), (), ())
    missing = sum(answer is None for answer in answers)
    if 0 < missing < len(answers):
        raise ValueError(f"prompt set {name!r}: {missing} of {len(answers)} rows have no response; give all or none")
    return PromptSet(name, kind, ids, prompts, None if missing or not answers else answers)


def _require_kind(kind: str | None, name: str) -> str:
    if kind is None:
        raise ValueError(f"prompt set {name!r}: pass kind=..., one of {_list(ALL_KINDS)}")
    return kind


def _read_row(row: Any, where: str) -> tuple[Any, str | None, str | None]:
    """Prompt, answer and id of a row."""
    if isinstance(row, str):
        return row, None, None
    prompt = _prompt_of(row.get("prompt")) if isinstance(row, Mapping) else None
    if prompt is None or not prompt_text(prompt).strip():
        found = f"keys {_list(map(str, row))}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise CorruptFileError(f"{where}: no prompt found ({found}); expected {ROWS}")
    answer = next((row[column] for column in ANSWER_COLUMNS if row.get(column) is not None), None)
    given = row.get("id")
    return prompt, None if answer is None else str(answer), None if given is None else str(given)


def _prompt_of(value: Any) -> Any:
    """Text or chat messages as a prompt; None for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not all(
        isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in value
    ):
        return None
    return tuple({"role": str(m["role"]), "content": str(m["content"])} for m in value)


def _prompts_in(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix not in FILE_ENDINGS:
        raise ValueError(
            f"{str(path)!r} is neither a prompt file ({_list(FILE_ENDINGS)}) nor a preset ({_list(PRESETS)}); "
            "another data set on the Hub is HUB_ID:SPLIT, or HubPrompts(...)"
        )
    for where, row in file_rows(path):
        yield where, {cell: value for cell, value in row.items() if value} if path.suffix == ".csv" else row


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a data file, each with the words for where it is; blank lines are none.

    Args:
        path: ``.jsonl`` with a JSON value per line, ``.json`` with a list of them, ``.txt`` with a text per line, or
            ``.csv`` with a header; UTF-8.

    Raises:
        CorruptFileError: a line that cannot be read, or has not the columns of the header, by number.
    """
    with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
        try:
            yield from _READERS[path.suffix](file)
        except (UnicodeDecodeError, csv.Error, _BrokenLine) as error:
            raise CorruptFileError(f"{path.name}: {error}; expected UTF-8 text, a row each: {ROWS}") from error


class _BrokenLine(Exception):
    """A line of a prompt file that cannot be read; never leaves this file."""


def _jsonl_rows(file: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _BrokenLine(f"line {number} is no JSON ({error})") from error
        yield f"line {number}", row


def _json_rows(file: Iterable[str]) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads("".join(file))
    except json.JSONDecodeError as error:
        raise _BrokenLine(f"it is no JSON ({error})") from error
    if not isinstance(rows, list):
        raise _BrokenLine(f"it is no list of rows but a {type(rows).__name__}")
    return ((f"row {i}", row) for i, row in enumerate(rows))


def _text_rows(file: Iterable[str]) -> Iterator[tuple[str, Any]]:
    return ((f"line {number}", line.strip()) for number, line in enumerate(file, start=1) if line.strip())


def _csv_rows(file: Iterable[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(file)
    for row in reader:
        where = f"line {reader.line_num}"
        if None in row or None in row.values():
            raise _BrokenLine(f"{where} has not the {len(reader.fieldnames or ())} columns of the header")
        yield where, row


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".txt": _text_rows}
FILE_ENDINGS = tuple(_READERS)


def _from_hub(source: HubPrompts, kind: str | None, name: str, limit: int | None) -> PromptSet:
    if os.path.exists(source.repo_id):  # a copy on this machine is no data set of the Hub, and its place is not told
        return _collect(_chosen_rows(source), kind or source.kind, Path(name).name, limit)
    commit = _commit(source)
    found = _collect(
        _chosen_rows(replace(source, revision=commit or source.revision)), kind or source.kind, name, limit
    )
    return replace(found, source=replace(source, revision=commit))


def _commit(source: HubPrompts) -> str | None:
    """The commit that the revision names now, so that what is read is what is reported; None when nobody can say."""
    from huggingface_hub import HfApi, errors

    if source.revision is not None and re.fullmatch("[0-9a-f]{40}", source.revision):
        return source.revision
    try:
        return HfApi().dataset_info(source.repo_id, revision=source.revision).sha
    except (errors.HTTPError, OSError) as error:  # the copy that datasets has may be readable all the same
        logger.warning("the commit of %s is not known, so reports name none: %s", source.repo_id, error)
        return None


def hub_rows(repo_id: str, *, split: str, config: str | None = None, revision: str | None = None) -> Any:
    """A split of a data set on the Hub, read with the package ``datasets``.

    Raises:
        PeftNLSRError: ``datasets`` is not installed, or the data set cannot be reached or has no such split.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise PeftNLSRError(
            f"{repo_id} is read with the package datasets, which is not installed: pip install 'peft-nlsr[datasets]'"
        ) from error
    try:
        return load_dataset(repo_id, config, split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise PeftNLSRError(
            f"{repo_id} ({split}) cannot be loaded: {str(error).partition(chr(10))[0]}. Check the name, the split and "
            "the network; some data sets ask to accept their terms on their page first"
        ) from error


def _chosen_rows(source: HubPrompts) -> Iterator[tuple[str, Any]]:
    data = hub_rows(source.repo_id, split=source.split, config=source.config, revision=source.revision)
    wanted = [source.prompt, *([source.answer] if source.answer else []), *([source.keep[0]] if source.keep else [])]
    missing = set(wanted) - set(data.column_names)
    if missing:
        raise PeftNLSRError(
            f"{source.repo_id} ({source.split}) has no column {_list(sorted(missing))}; it has "
            f"{_list(data.column_names)}. Pass HubPrompts(...) with the right names"
        )
    for i, row in enumerate(data):
        if source.keep is None or row[source.keep[0]] == source.keep[1]:
            yield f"row {i}", {"prompt": row[source.prompt], "response": row[source.answer] if source.answer else None}


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
