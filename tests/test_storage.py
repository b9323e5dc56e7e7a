"""Files are safetensors to the byte, are read one tensor at a time, and appear whole or not at all."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_nlsr import files, storage
from peft_nlsr.errors import CorruptFileError
from peft_nlsr.storage import TensorFile, replace_folder, require_finite, write_tensors

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.complex64,
    torch.float64,
    torch.int64,
    torch.uint64,
]
SHAPES = [(3,), (2, 5), (), (0, 4)]
knows_every_dtype = pytest.mark.skipif(
    Version(safetensors.__version__) < Version("0.7"), reason="safetensors below 0.7 lacks some of these dtypes"
)


def every_kind() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            values = torch.randint(0, 2, shape, generator=generator)
            tensors[f"é.{dtype}.{len(shape)}.{shape[0] if shape else 's'}"] = values.to(dtype)
    return tensors


def specs_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one_tensor(path: Path) -> Path:
    save_file({"w": torch.arange(6, dtype=torch.float32).reshape(2, 3)}, path, metadata={"format": "pt"})
    return path


@knows_every_dtype
def test_written_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = every_kind()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", specs_of(tensors), tensors.__getitem__, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@knows_every_dtype
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_every_dtype_and_shape_is_read_back_bit_for_bit(tmp_path: Path, writer: str) -> None:
    tensors, path = every_kind(), tmp_path / "file"
    if writer == "ours":
        write_tensors(path, specs_of(tensors), tensors.__getitem__)
    else:
        save_file(tensors, path)
    file, theirs = TensorFile(path), load_file(path)
    assert set(file.names) == set(file) == set(theirs) == set(tensors) and len(file) == len(tensors)
    for name, tensor in tensors.items():
        assert same_bits(file[name], tensor) and same_bits(theirs[name], tensor), name
        assert file.spec(name) == (tensor.dtype, tuple(tensor.shape))


def test_metadata_is_kept_and_may_be_absent(tmp_path: Path) -> None:
    write_tensors(tmp_path / "with", {}, every_kind().__getitem__, {"format": "pt"})
    write_tensors(tmp_path / "without", {}, every_kind().__getitem__)
    assert TensorFile(tmp_path / "with").metadata == {"format": "pt"}
    assert TensorFile(tmp_path / "without").metadata == {}


def test_one_tensor_is_asked_for_at_a_time_in_file_order(tmp_path: Path) -> None:
    tensors, asked = every_kind(), []

    def give(name: str) -> Tensor:
        asked.append(name)
        return tensors[name]

    write_tensors(tmp_path / "file", specs_of(tensors), give)
    assert tuple(asked) == TensorFile(tmp_path / "file").names


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.arange(6.0).reshape(2, 3).T, id="transposed"),
        pytest.param(torch.arange(6.0)[::2], id="strided"),
        pytest.param(torch.ones(1).expand(4), id="expanded"),
    ],
)
def test_a_tensor_that_is_not_contiguous_is_written_by_value(tmp_path: Path, tensor: Tensor) -> None:
    write_tensors(tmp_path / "file", {"w": (torch.float32, tuple(tensor.shape))}, lambda _: tensor)
    torch.testing.assert_close(load_file(tmp_path / "file")["w"], tensor, rtol=0, atol=0)


def test_unknown_name_is_a_key_error(tmp_path: Path) -> None:
    file = TensorFile(one_tensor(tmp_path / "file"))
    assert "v" not in file
    with pytest.raises(KeyError):
        file["v"]


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        pytest.param({"w": F32}, b"1234567", "truncated: found 7 bytes.*expected 8", id="data-too-short"),
        pytest.param({"w": F32}, b"123456789", "too long: found 9 bytes.*expected 8", id="data-too-long"),
        pytest.param({"w": F32 | {"dtype": "F7"}}, b"8" * 8, "w has unknown dtype 'F7'", id="unknown-dtype"),
        pytest.param({"w": F32 | {"dtype": ["F32"]}}, b"8" * 8, "w has a malformed", id="dtype-not-text"),
        pytest.param({"w": F32 | {"shape": [3]}}, b"8" * 8, "w .* spans 8 bytes, expected 12", id="shape-not-size"),
        pytest.param({"w": F32 | {"shape": [-2]}}, b"8" * 8, "w has a malformed", id="negative-shape"),
        pytest.param({"w": F32 | {"shape": [2.0]}}, b"8" * 8, "w has a malformed", id="fractional-shape"),
        pytest.param({"w": F32 | {"data_offsets": [0]}}, b"8" * 8, "w has a malformed", id="one-offset"),
        pytest.param({"w": {"dtype": "F32"}}, b"", "w has a malformed", id="no-shape"),
        pytest.param({"w": 7}, b"", "w has a malformed", id="entry-not-object"),
        pytest.param({"w": F32 | {"data_offsets": [8, 16]}}, b"8" * 16, "w starts at byte 8, expected 0", id="gap"),
        pytest.param({"v": F32, "w": F32}, b"8" * 8, "w starts at byte 0, expected 8", id="overlap"),
        pytest.param({"__metadata__": 3}, b"", "__metadata__", id="metadata-not-object"),
        pytest.param(b"{nonsense", b"", "header is not JSON", id="header-not-json"),
        pytest.param(b'{"\xff": 1}', b"", "header is not JSON", id="header-not-utf8"),
        pytest.param(b'{"w":' + b"[" * 100_000, b"", "header is not JSON", id="header-too-deep"),
        pytest.param(b"[1, 2]", b"", "not a safetensors file", id="header-a-list"),
    ],
)
def test_a_contradictory_file_is_refused_by_name(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    path = raw_file(tmp_path / "adapter.safetensors", header, data)
    with pytest.raises(CorruptFileError, match=f"(?s)adapter.safetensors.*{words}.*Download it again"):
        TensorFile(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "not a safetensors file", id="empty"),
        pytest.param(b"\x08\x00", "not a safetensors file", id="shorter-than-the-length"),
        pytest.param(b"PK\x03\x04" * 20, "not a safetensors file", id="zip-or-pickle"),
        pytest.param(struct.pack("<Q", 50) + b"{}", "truncated in the header: found 10.*at least 58", id="header-cut"),
        pytest.param(struct.pack("<Q", 50), "truncated in the header: found 8.*at least 58", id="only-the-length"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="lfs-pointer"),
    ],
)
def test_what_is_not_a_whole_header_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"(?s){words}"):
        TensorFile(tmp_path / "file")


def test_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    content = one_tensor(tmp_path / "whole").read_bytes()
    for size in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(CorruptFileError):
            TensorFile(tmp_path / "cut")


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    file = TensorFile(one_tensor(tmp_path / "file"))
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-5])
    with pytest.raises(CorruptFileError, match="truncated in tensor w: found 19 bytes, expected 24"):
        file["w"]


class Stop(BaseException):
    """Stands for what is not an Exception: Ctrl-C, sys.exit."""


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        pytest.param(torch.zeros(3), ValueError, r"w should be torch.float32 \(2,\)", id="wrong-shape"),
        pytest.param(torch.zeros(2).half(), ValueError, "found torch.float16", id="wrong-dtype"),
        pytest.param(OSError("disk full"), OSError, "disk full", id="source-fails"),
        pytest.param(KeyboardInterrupt(), KeyboardInterrupt, None, id="ctrl-c"),
        pytest.param(Stop(), Stop, None, id="exit"),
    ],
)
@pytest.mark.parametrize("before", [None, b"old"], ids=["new", "overwrites"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, given: Any, error: Any, words: Any, before: Any) -> None:
    if before is not None:
        (tmp_path / "file").write_bytes(before)

    def give(name: str) -> Tensor:
        if isinstance(given, BaseException):
            raise given
        return given

    with pytest.raises(error, match=words):
        write_tensors(tmp_path / "file", {"w": (torch.float32, (2,))}, give)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"file": before} if before else {})


def test_all_bytes_are_on_disk_before_the_file_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = [], files.os.fsync

    def noted(descriptor: int) -> None:
        synced.append((files.os.fstat(descriptor).st_size, (tmp_path / "file").exists()))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", noted)
    tensors = every_kind()
    write_tensors(tmp_path / "file", specs_of(tensors), tensors.__getitem__)
    assert synced == [((tmp_path / "file").stat().st_size, False)]


def test_a_dtype_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w has dtype torch\.complex128"):
        write_tensors(tmp_path / "file", {"w": (torch.complex128, (1,))}, lambda _: torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def fill_two(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("a")
    (folder / "b").write_text("b")


@pytest.mark.parametrize("before", ["absent", "empty", "absent-parent"])
def test_a_folder_appears_complete(tmp_path: Path, before: str) -> None:
    output = tmp_path / "parent" / "out" if before == "absent-parent" else tmp_path / "out"
    if before == "empty":
        output.mkdir()

    def fill(folder: Path) -> None:
        fill_two(folder)
        assert folder.parent == output.parent and not (output / "b").exists()

    replace_folder(output, fill)
    assert sorted(str(p.relative_to(output)) for p in output.rglob("*")) == ["b", "sub", "sub/a"]
    assert [p.name for p in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("taken_by", ["folder", "file"])
def test_an_output_that_holds_something_is_never_touched(tmp_path: Path, taken_by: str) -> None:
    path = tmp_path / "out" / "mine" if taken_by == "folder" else tmp_path / "out"
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"not an empty folder.*Choose another output"):
        replace_folder(tmp_path / "out", fill_two)
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_a_failed_fill_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def fill(folder: Path) -> None:
        fill_two(folder)
        raise error

    with pytest.raises(error):
        replace_folder(tmp_path / "out", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_shell_that_stands_in_the_output_stands_there_afterwards(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    program = "from peft_nlsr.storage import *; from test_storage import *; replace_folder('.', fill_two)"
    python = f'"{sys.executable}" -c'
    shell = f"""{python} "{program}" && pwd -P && cat b sub/a && {python} "open('c', 'w')" """
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        shell, shell=True, cwd=tmp_path / "out", env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{(tmp_path / 'out').resolve()}\nba"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b", "c", "sub"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("moves", [0, 1])
def test_a_failed_move_into_the_current_folder_leaves_it_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int, error: type[BaseException]
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    rename, done = os.rename, []

    def failing(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise error
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(storage.os, "rename", failing)
    with pytest.raises(error):
        replace_folder(".", fill_two)
    assert len(done) == moves
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_what_appears_in_the_current_folder_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")

    def fill(folder: Path) -> None:
        fill_two(folder)
        (tmp_path / "out" / "b").write_text("mine")

    with pytest.raises(FileExistsError, match="not an empty folder"):
        replace_folder(".", fill)
    assert (tmp_path / "out" / "b").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["b", "out"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted_and_named(bad: float) -> None:
    tensor = torch.zeros(3, 3)
    require_finite(tensor, "lora_A of m")
    tensor[0, 0] = tensor[2, 1] = bad
    with pytest.raises(CorruptFileError, match="lora_A of m holds 2 NaN or infinite values of 9"):
        require_finite(tensor, "lora_A of m")
