"""Files and folders that appear whole or not at all: made under a hidden name, put on disk, then renamed; and how text
and JSON are read back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import CorruptFileError


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """A free hidden name beside ``path``; what is made there becomes ``path``, or is removed after an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def read_text(path: Path) -> str | None:
    """A text file with its line ends as they are; None when there is none."""
    if not path.is_file():
        return None
    with open(path, encoding="utf-8-sig", newline="") as file:
        return file.read()


def read_json(path: Path, advice: str = "download it again, or write it again") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CorruptFileError: the file holds something else; the text ends with the advice.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text file with its line ends as they are; its folder is made when missing."""
    with temporary_sibling(path) as temporary:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            file.write(text)
        sync(temporary)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON values, sorted by key.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    write_text(path, json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")
