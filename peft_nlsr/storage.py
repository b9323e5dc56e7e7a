"""Reading and writing safetensors one tensor at a time, and adapter folders that appear whole or not at all.

Files are read with plain reads and never memory-mapped, so that peak memory is one tensor, not one file. Nothing here
knows PEFT; only safetensors and JSON are understood, never pickle.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor

from .errors import CorruptFileError
from .files import hidden_sibling, sync, temporary_sibling

# In the order of the format's own enumeration: files list the later types first, which keeps every tensor aligned.
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PRIORITY = {dtype: -place for place, dtype in enumerate(_DTYPES.values())}
_LONGEST_HEADER = 100_000_000

Spec = tuple[torch.dtype, tuple[int, ...]]


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping from tensor name to tensor; each access reads that tensor and nothing else.

    The header is checked when the file is opened. Iteration is in file order.

    Raises:
        CorruptFileError: not a safetensors file, truncated, or with a header that contradicts its size.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header, self._start, stored = _read_header(self.path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            _corrupt(self.path, f"__metadata__ should be an object, found {metadata!r}")
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self._entries = {name: _parse_entry(self.path, name, entry) for name, entry in header.items()}
        self._entries = dict(sorted(self._entries.items(), key=lambda item: item[1][1:]))
        _check_offsets(self.path, self._entries, stored)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in file order."""
        return tuple(self._entries)

    def spec(self, name: str) -> Spec:
        """``(dtype, shape)`` of a tensor, from the header alone."""
        return self._entries[name][0]

    def __getitem__(self, name: str) -> Tensor:
        (dtype, shape), begin, end = self._entries[name]
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            file.seek(self._start + begin)
            found = file.readinto(buffer.numpy().data)
        if found != end - begin:
            _corrupt(self.path, f"truncated in tensor {name}: found {found} bytes, expected {end - begin}")
        return buffer.view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def write_tensors(
    path: str | os.PathLike[str],
    specs: Mapping[str, Spec],
    tensors: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, asking ``tensors(name)`` for one tensor at a time, in file order.

    The bytes are those of ``safetensors.torch.save_file``: wider types first, then by name. The file appears at
    ``path`` when it is complete and on disk; after any exception nothing does.

    Raises:
        ValueError: a tensor does not match its spec, or a dtype that the format does not have.
    """
    order = sorted(specs, key=lambda name: (_priority(name, specs[name][0]), name))
    with temporary_sibling(Path(path)) as temporary:
        with open(temporary, "xb") as file:
            file.write(_header(order, specs, metadata))
            for name in order:
                file.write(_raw_bytes(name, tensors(name), specs[name]))
        sync(temporary)


def replace_folder(output: str | os.PathLike[str], fill: Callable[[Path], None]) -> None:
    """Let ``fill(folder)`` write a folder that appears at ``output`` in one rename, complete and on disk.

    Into the current folder, which must stay for who stands in it, what was written is moved entry by entry, and taken
    out again when that fails.

    Raises:
        FileExistsError: ``output`` exists and is not an empty folder.
    """
    output = require_new(output)
    if output.exists() and output.samefile(os.curdir):
        _fill_existing(output, fill)
        return
    with temporary_sibling(output) as temporary:
        _fill_new(temporary, fill)
        # Only POSIX renames onto an empty folder.
        if output.exists():
            output.rmdir()


def _fill_new(folder: Path, fill: Callable[[Path], None]) -> None:
    folder.mkdir()
    fill(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def _fill_existing(folder: Path, fill: Callable[[Path], None]) -> None:
    temporary, moved = hidden_sibling(folder), list[Path]()
    try:
        _fill_new(temporary, fill)
        require_new(folder)  # what somebody has put there in the meantime is neither replaced nor removed
        for path in sorted(temporary.iterdir()):
            moved.append(folder / path.name)
            os.rename(path, moved[-1])
    except BaseException:
        for path in moved:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new(output: str | os.PathLike[str]) -> Path:
    """The absolute path of an output folder that does not exist yet or is empty, else FileExistsError."""
    path = Path(os.path.abspath(output))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not an empty folder; nothing was written. Choose another output, or remove it."
        )
    return path


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise CorruptFileError, naming ``what`` and how many values, when a tensor holds NaN or infinite values."""
    # Extremes are several times faster than a test of each value, and NaN is both of them.
    if tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        return
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    raise CorruptFileError(
        f"{what} holds {bad} NaN or infinite values of {tensor.numel()}. Train or save it again; "
        "a float16 overflow is the usual cause."
    )


def _corrupt(path: Path, problem: str) -> NoReturn:
    raise CorruptFileError(f"{path}: {problem}. Download it again, or save it again.")


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the offset at which tensor data starts, and the bytes of tensor data that the file holds."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            _corrupt(path, "is a Git LFS pointer, not the file itself (run `git lfs pull`)")
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _LONGEST_HEADER or file.read(1) not in (b"{", b""):
            _corrupt(path, f"is not a safetensors file ({size} bytes)")
        if size < 8 + length:
            _corrupt(path, f"truncated in the header: found {size} bytes, expected at least {8 + length}")
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        _corrupt(path, f"the header is not JSON ({error})")
    return header, 8 + length, size - 8 - length


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[Spec, int, int]:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        _corrupt(path, f"tensor {name} has a malformed header entry {entry!r}")
    if dtype not in _DTYPES:
        _corrupt(path, f"tensor {name} has unknown dtype {dtype!r}; known are {', '.join(_DTYPES)}")
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != expected:
        _corrupt(path, f"tensor {name} of {dtype} {list(shape)} spans {end - begin} bytes, expected {expected}")
    return (_DTYPES[dtype], shape), begin, end


def _check_offsets(path: Path, entries: Mapping[str, tuple[Spec, int, int]], stored: int) -> None:
    position = 0
    for name, (_, begin, end) in entries.items():
        if begin != position:
            _corrupt(path, f"tensor {name} starts at byte {begin}, expected {position}: a gap or an overlap")
        position = end
    if stored != position:
        problem = "truncated" if stored < position else "too long"
        _corrupt(path, f"{problem}: found {stored} bytes of tensor data, expected {position}")


def _priority(name: str, dtype: torch.dtype) -> int:
    if dtype not in _PRIORITY:
        raise ValueError(f"{name} has dtype {dtype}, which safetensors files written here cannot hold")
    return _PRIORITY[dtype]


def _header(order: list[str], specs: Mapping[str, Spec], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        dtype, shape = specs[name]
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw_bytes(name: str, tensor: Tensor, spec: Spec) -> memoryview:
    found = (tensor.dtype, tuple(tensor.shape))
    if found != (spec[0], tuple(spec[1])):
        raise ValueError(f"{name} should be {spec[0]} {tuple(spec[1])}, found {found[0]} {found[1]}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
