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
    path = Path(os.path.abspath(path))  # "." has no name of its own
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_sibling(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def hidden_sibling(path: Path) -> Path:
    """A free hidden name beside an absolute path."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def sync(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def read_text(path: Path) -> str | None:
    """A text file with its line ends as they are; None when there is none.

    Raises:
        CorruptFileError: the file is not UTF-8.
    """
    if not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not UTF-8 ({error}); save it as UTF-8, or remove it") from error


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


def require_schema(values: Mapping[str, Any], known: int, what: str) -> None:
    """Raise CorruptFileError where ``values`` name another schema version than the known one; none at all is that."""
    found = values.get("schema_version", known)
    if type(found) is not int or found != known:
        newer = type(found) is int and found > known
        advice = "upgrade peft_nlsr (pip install -U peft-nlsr)" if newer else "write it again, or download it again"
        raise CorruptFileError(
            f"found schema_version {found!r} in {what}, this version of peft_nlsr reads {known}; {advice}"
        )


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
