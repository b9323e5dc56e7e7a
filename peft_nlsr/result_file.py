"""Finished results of a long run in a JSON file, so that a run that was cut off goes on where it stopped.

Only numbers, ids and verdicts are put in; the file is replaced whole after every result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CorruptFileError, IncompatibleError
from .files import read_json, write_json

SCHEMA_VERSION = 1
OTHERWISE = "remove it, or give another file"


def key_of(values: Any) -> str:
    """A short name for JSON values, the same for equal ones."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()[:24]


class ResultFile:
    """Results by key, in memory and, with a path, on disk.

    Args:
        path: made with the first result; None keeps the results in memory only.
        made_with: what every result depends on (model, prompts, judges, data), JSON values.

    Raises:
        IncompatibleError: the file's results were made with something else.
        CorruptFileError: it is no such file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, made_with: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._head = {"schema_version": SCHEMA_VERSION, "made_with": json.loads(json.dumps(made_with))}
        self._results: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            self._results = self._read(self._path)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result with this key, or None."""
        return self._results.get(key)

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep a result, JSON values; it is on disk when this returns."""
        self._results[key] = dict(result)
        if self._path is not None:
            write_json(self._path, {**self._head, "results": self._results})

    def _read(self, path: Path) -> dict[str, Any]:
        content = read_json(path, OTHERWISE)
        if not isinstance(content.get("results"), dict):
            raise CorruptFileError(f"{path.name} holds no results of an earlier run; remove it, or give another file")
        found, expected = content.get("made_with"), self._head["made_with"]
        if content.get("schema_version") != SCHEMA_VERSION or not isinstance(found, dict) or found != expected:
            differ = sorted(k for k in expected if not isinstance(found, dict) or found.get(k) != expected[k])
            raise IncompatibleError(
                f"the results in {path.name} were made with another {', '.join(differ) or 'version'}; give each "
                "model, each data set and each set of prompts a file of its own"
            )
        return content["results"]
