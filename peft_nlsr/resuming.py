"""Solved blocks of an unfinished two-teacher run, on disk, so that an interrupted run goes on where it stopped.

One safetensors file per block and one JSON file that says what the run is made from. A folder made from anything else
is refused; only files written here are ever removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .edits import Solved
from .errors import CorruptFileError, IncompatibleError
from .files import read_json, write_json
from .lowrank import LowRank
from .storage import Spec, TensorFile, write_tensors

MADE_FROM_NAME = "two_teacher.json"
SCHEMA_VERSION = 1


class SolvedBlocks:
    """The solved modules of a run, block by block.

    Args:
        folder: made when missing.
        made_from: everything that the solutions depend on, JSON values.

    Raises:
        IncompatibleError: the folder belongs to a run with other inputs, or is in use for something else.
        CorruptFileError: its JSON cannot be read.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        self.folder = folder
        self._described = folder / MADE_FROM_NAME
        found = read_json(self._described, "give another work_dir") if self._described.exists() else None
        content = {"schema_version": SCHEMA_VERSION, **made_from}
        if found is None:
            _require_empty(folder)
            write_json(self._described, content)
        elif found != json.loads(json.dumps(content)):
            differ = sorted(key for key in {*found, *content} if found.get(key) != content.get(key))
            raise IncompatibleError(
                f"{folder} holds an unfinished run that differs in {', '.join(differ)}; give the same inputs to go on "
                "with it, or another work_dir"
            )

    def load(self, index: int) -> dict[str, Solved] | None:
        """The solutions of a block, None where it was not finished."""
        path = self._path(index)
        if not path.exists():
            return None
        file = TensorFile(path)
        try:
            modules: dict[str, Any] = json.loads(file.metadata["modules"])
            columns: list[str] = json.loads(file.metadata["stored_by_columns"])

            def factor(key: str) -> Tensor:
                return file[key].T if key in columns else file[key]

            return {
                name: Solved(LowRank(factor(f"{name}.A"), factor(f"{name}.B"), scale), *errors)
                for name, (scale, *errors) in modules.items()
            }
        except (KeyError, ValueError) as error:
            raise CorruptFileError(f"{path} is no solved block; remove it, and the block is solved again") from error

    def save(self, index: int, solved: Mapping[str, Solved]) -> None:
        """Write the solutions of a finished block, complete or not at all.

        The order of a matrix in memory is kept too: products of the same numbers in another order round differently.
        """
        tensors = {
            f"{name}.{factor}": tensor
            for name, (update, _, _) in solved.items()
            for factor, tensor in (("A", update.A), ("B", update.B))
        }
        columns = [key for key, tensor in tensors.items() if not tensor.is_contiguous()]
        tensors |= {key: tensors[key].T for key in columns}
        specs: dict[str, Spec] = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        said = {name: (s.update.scale, s.truncation_error, s.solver_error) for name, s in solved.items()}
        metadata = {"modules": json.dumps(said), "stored_by_columns": json.dumps(columns)}
        write_tensors(self._path(index), specs, tensors.__getitem__, metadata)

    def remove(self) -> None:
        """Remove what was written, and the folder when nothing else is in it."""
        for path in (*self.folder.glob("block_*.safetensors"), self._described):
            path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, index: int) -> Path:
        return self.folder / f"block_{index:04d}.safetensors"


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise IncompatibleError(f"{folder} is not a folder of an unfinished run; give a new or an empty work_dir")
