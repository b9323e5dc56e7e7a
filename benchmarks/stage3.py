"""Realignment of a saved adapter at the shapes of a large model, in a process of its own, against a copy of the files.

``python -m benchmarks.stage3 ADAPTER PATCH OUTPUT THREADS RESTORE_RATE`` is that process; it prints its figures as
JSON.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_nlsr.adapter_folder import AdapterFolder
from peft_nlsr.adapters import WEIGHTS_FILE
from peft_nlsr.config import NLSRConfig
from peft_nlsr.edits import masked
from peft_nlsr.folders import realign_folder
from peft_nlsr.lowrank import LowRank
from peft_nlsr.patch import ModulePatch, SafetyPatch
from peft_nlsr.scores import InputSketch, ModuleStatistics, safety_masks
from peft_nlsr.storage import write_tensors

from .timing import compared, medians, timed

ROOT = Path(__file__).parent.parent
BASE_MODEL = "benchmark/random-weights"


def measure(config: dict[str, Any]) -> list[dict[str, Any]]:
    """One row: times and peak memory of the process, times of the copy, and the error of what was written."""
    with tempfile.TemporaryDirectory(prefix="peft_nlsr_benchmark_") as name:
        folder = Path(name)
        shapes = _shapes(config)
        _write_adapter(folder / "adapter", shapes, config)
        patch = SafetyPatch(_RandomPatch(shapes, config), _record(shapes, config), _RandomInputs(shapes, config))
        patch.save(folder / "patch")
        runs = [_realign_then_copy(folder, config) for _ in range(config["repeats"])]
        return [{"name": f"{len(shapes)} modules", **medians(runs), **_check(folder, patch)}]


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Module name -> ``(d_out, d_in)``."""
    hidden, kv, wide = config["hidden"], config["kv"], config["intermediate"]
    kinds = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    return {f"model.layers.{i}.{kind}": shape for i in range(config["blocks"]) for kind, shape in kinds.items()}


def _random_reference(index: int, shape: tuple[int, int], config: dict[str, Any]) -> LowRank:
    generator = torch.Generator().manual_seed(index)
    A = torch.randn(config["rank"], shape[1], generator=generator) / shape[1] ** 0.5
    B = torch.randn(shape[0], config["rank"], generator=generator) * 0.01
    return LowRank(A, B, config["alpha"] / config["rank"])


def _fine_tuned(reference: LowRank, index: int) -> LowRank:
    """The reference plus noise, more of it in some modules, so that similarities differ."""
    generator = torch.Generator().manual_seed(10_000 + index)
    drift = 0.1 + 0.1 * (index % 7)

    def moved(factor: Tensor) -> Tensor:
        noise = torch.randn(factor.shape, generator=generator) * factor.std()
        return (factor + drift * noise).to(torch.bfloat16)

    return LowRank(moved(reference.A), moved(reference.B), reference.scale)


def _write_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], config: dict[str, Any]) -> None:
    from peft import LoraConfig

    rank = config["rank"]
    lora = LoraConfig(
        r=rank,
        lora_alpha=config["alpha"],
        target_modules=sorted({name.rpartition(".")[2] for name in shapes}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_MODEL,
    )
    lora.save_pretrained(str(folder))
    specs = {}
    owner: dict[str, tuple[int, str]] = {}
    for index, (name, (d_out, d_in)) in enumerate(shapes.items()):
        for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            key = f"base_model.model.{name}.lora_{factor}.weight"
            specs[key], owner[key] = (torch.bfloat16, shape), (index, name)

    def tensor(key: str) -> Tensor:
        index, name = owner[key]
        tuned = _fine_tuned(_random_reference(index, shapes[name], config), index)
        return tuned.A if ".lora_A." in key else tuned.B

    write_tensors(folder / WEIGHTS_FILE, specs, tensor, {"format": "pt"})


class _RandomPatch(Mapping[str, ModulePatch]):
    """A patch made module by module, so that building it takes the memory of one; the last one is kept."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: dict[str, Any]) -> None:
        self._index = {name: index for index, name in enumerate(shapes)}
        self._shapes, self._config = shapes, config
        self._last: tuple[str, ModulePatch] | None = None

    def __getitem__(self, module: str) -> ModulePatch:
        if self._last is None or self._last[0] != module:
            self._last = module, self._made(module)
        return self._last[1]

    def _made(self, module: str) -> ModulePatch:
        reference = _random_reference(self._index[module], self._shapes[module], self._config)
        settings = NLSRConfig(score="magnitude", sparsity=self._config["sparsity"])
        unused = ModuleStatistics(0, torch.zeros(0), torch.zeros(0))
        masks = safety_masks(reference, unused, settings, generator=torch.Generator())
        return ModulePatch(masks, masked(reference, masks))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class _RandomInputs(Mapping[str, InputSketch]):
    """What the reference saw of each module's inputs, made when asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: dict[str, Any]) -> None:
        self._index = {name: index for index, name in enumerate(shapes)}
        self._shapes, self._rank = shapes, config["rank"]

    def __getitem__(self, module: str) -> InputSketch:
        generator = torch.Generator().manual_seed(20_000 + self._index[module])
        d_in = self._shapes[module][1]
        strength = torch.arange(1, self._rank + 1).float().rsqrt()[:, None]
        rows = torch.randn(self._rank, d_in, generator=generator) * strength
        return InputSketch(rows.bfloat16(), torch.rand(d_in, generator=generator))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _record(shapes: Mapping[str, tuple[int, int]], config: dict[str, Any]) -> dict[str, Any]:
    rank = config["rank"]

    def kept(size: int) -> int:
        return size - int(size * config["sparsity"])

    return {
        "schema_version": 1,
        "base_model": BASE_MODEL,
        "reference": {"kind": "adapter", "description": "random weights"},
        "modules": {
            name: {
                "rank": rank,
                "shape": [d_out, d_in],
                "scale": config["alpha"] / rank,
                "kept_A": kept(rank * d_in),
                "kept_B": kept(d_out * rank),
                "inputs": rank,
            }
            for name, (d_out, d_in) in shapes.items()
        },
    }


def _realign_then_copy(folder: Path, config: dict[str, Any]) -> dict[str, float]:
    """Figures of one run; leaves its output in place of an earlier one."""
    output, copied = folder / "output", folder / "copied"
    for old in (output, copied):
        shutil.rmtree(old, ignore_errors=True)
    arguments = [folder / "adapter", folder / "patch", output, torch.get_num_threads(), config["restore_rate"]]
    command = [sys.executable, "-m", "benchmarks.stage3", *map(str, arguments)]
    os.sync()
    process, done = timed(lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True))
    os.sync()
    copy, _ = timed(lambda: _copy_to_disk(output, copied))
    figures = json.loads(done.stdout)
    size = sum(path.stat().st_size for path in output.iterdir())
    own = {"cpu": figures.pop("cpu_s"), "wall": process["wall"]}
    return {**compared(own, copy), **figures, "written_mb": size / 1e6}


def _copy_to_disk(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb+") as file:
            os.fsync(file.fileno())


def _check(folder: Path, patch: SafetyPatch) -> dict[str, Any]:
    """Untouched modules bit for bit, and the smallest restored one against the best dense rank-r update."""
    before, after = AdapterFolder(folder / "adapter"), AdapterFolder(folder / "output")
    record = json.loads((folder / "output" / "nlsr_config.json").read_text("utf-8"))["record"]
    restored = [module["module"] for module in record["modules"] if module["restored"]]
    for name in set(before) - set(restored):
        if not (torch.equal(before[name].A, after[name].A) and torch.equal(before[name].B, after[name].B)):
            raise ValueError(f"{name} was not selected, but its weights changed")
    smallest = min(restored, key=lambda name: math.prod(before[name].shape))
    wanted = _dense_restored(before[smallest], patch[smallest], patch.inputs[smallest])
    error = float((after[smallest].dense().double() - wanted).norm() / wanted.norm())
    return {"restored": len(restored), "error": error}


def _dense_restored(tuned: LowRank, module: ModulePatch, inputs: InputSketch) -> Tensor:
    """NLSR eq. 12 as it is written, with full matrices in float64, cut to the rank that is best for the inputs."""
    safe, rest = (
        update.scale * (update.B.double() @ update.A.double())
        for update in (module.reference, masked(tuned, module.masks, inside=False))
    )
    total, rows = safe + rest, inputs.rows.double()
    seen = (total @ rows.T) @ (total @ rows.T).T + (total * inputs.rest.double()) @ total.T
    left = torch.linalg.eigh(seen).eigenvectors[:, -tuned.rank :]
    return left @ (left.T @ total)


def _peak_mb() -> float:
    """Peak memory of this process. Not ``ru_maxrss``, which on Linux starts at the parent's size."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def _run_process(adapter: str, patch: str, output: str, threads: str, restore_rate: str) -> None:
    torch.set_num_threads(int(threads))
    imports_mb = _peak_mb()
    config = NLSRConfig(update="sum", restore_rate=float(restore_rate))
    call, _ = timed(lambda: realign_folder(adapter, output, patch=patch, config=config))
    # Of the whole process, start of Python and imports included.
    cpu_s = time.process_time()
    figures = {"cpu_s": cpu_s, "call_s": call["cpu"], "imports_mb": imports_mb, "peak_mb": _peak_mb()}
    print(json.dumps(figures))


if __name__ == "__main__":
    _run_process(*sys.argv[1:])
