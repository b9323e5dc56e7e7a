"""Safety references from public checkpoints: the aligned minus the unaligned model, as a LoRA adapter.

Checkpoints are read a few rows at a time from safetensors shards, so that one float32 difference and the factors are
all that is ever in memory. What does not pair up is an error or a note, never skipped in silence.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .adapter_folder import AdapterFolder
from .adapters import WEIGHTS_FILE, factor_keys, natural_order
from .edits import EXACT_SVD_SIDE
from .errors import CorruptFileError, IncompatibleError, PeftNLSRError, UnsupportedAdapterError
from .files import read_json, write_json
from .lowrank import LowRank
from .storage import Spec, TensorFile, replace_folder, require_finite, require_new, write_tensors

SCHEMA_VERSION = 1
RECORD_NAME = "safety_reference.json"
ALL_LINEAR = "all-linear"

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_METADATA_KEY = "peft_nlsr_reference"
_CHUNK_BYTES = 4 << 20
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK = re.compile(r"[^.]+\.\d+\..+")
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in")
_FUSED = ("qkv", "gate_up", "query_key_value", "c_attn", "in_proj")
# The linear layers of their blocks are Conv1D, which stores (d_in, d_out).
_TRANSPOSED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_GEOMETRY = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class ModuleDelta:
    """What was kept of one module's difference D.

    Attributes:
        module: its name, as in the model.
        shape: ``(d_out, d_in)``.
        norm: Frobenius norm of D.
        captured: share of ``|D|^2`` in the kept directions; 1 when D is zero.
    """

    module: str
    shape: tuple[int, int]
    norm: float
    captured: float


@dataclass(frozen=True)
class CheckpointRecord:
    """How a reference was extracted.

    Attributes:
        aligned, base: Hub ids; None for local folders, whose paths are nobody's business.
        rank: directions kept per module.
        modules: one entry per module.
        notes: sentences that a user should read: what was skipped, cast or paired under another name.
    """

    aligned: str | None
    base: str | None
    rank: int
    modules: tuple[ModuleDelta, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


class Checkpoint(Mapping[str, Spec]):
    """Tensor name -> ``(dtype, shape)`` of a model's safetensors checkpoint; rows are read when asked for.

    Args:
        source: folder or Hub id; of a Hub repository only the shards that are read are downloaded.

    Raises:
        CorruptFileError: no safetensors checkpoint there, or shards and index that do not belong together.
        UnsupportedAdapterError: only pickles are there.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self._source = str(source)
        self._local = Path(source).is_dir()
        self.model = None if self._local else self._source
        path = self._fetch("config.json")
        self.config: dict[str, Any] = {} if path is None else read_json(path)
        self._shard_of = self._read_index()
        self._shards: dict[str, _RowFile] = {}

    def _fetch(self, name: str) -> Path | None:
        """A file of the checkpoint on this machine, or None when the checkpoint has no such file."""
        if self._local:
            path = Path(self._source, name)
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(hf_hub_download(self._source, name))
        except LocalEntryNotFoundError as error:
            raise PeftNLSRError(
                f"{name} of {self._source!r} is not in the local cache and could not be downloaded ({error}); check "
                "the network, or download the model first and give its folder"
            ) from error
        except EntryNotFoundError:
            return None
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            raise PeftNLSRError(
                f"{self._source!r} is not an existing folder, and from the Hub: {error}. Check the name and the "
                "access token"
            ) from error

    def _read_index(self) -> dict[str, str]:
        index = self._fetch(_INDEX)
        if index is not None:
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise CorruptFileError(f"{index} holds no weight_map from tensors to files; download it again")
            return shards
        single = self._fetch(_SINGLE)
        if single is not None:
            return dict.fromkeys(TensorFile(single), _SINGLE)
        if self._local and any(Path(self._source).glob("*.bin")):
            raise UnsupportedAdapterError(
                f"{self._source} holds only pickled weights (.bin), which are never opened. Convert them once where "
                "you trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise CorruptFileError(f"{self._source} has neither {_SINGLE} nor {_INDEX}; give a model saved as safetensors")

    def _shard(self, tensor: str) -> _RowFile:
        shard = self._shard_of[tensor]
        if shard not in self._shards:
            path = self._fetch(shard) if Path(shard).name == shard else None
            if path is None:
                raise CorruptFileError(
                    f"{self._source}: {_INDEX} puts {tensor} into {shard}, which is missing; download the model again"
                )
            self._shards[shard] = _RowFile(path)
        if tensor not in self._shards[shard].names:
            raise CorruptFileError(
                f"{self._source}: {_INDEX} puts {tensor} into {shard}, which does not hold it; the index belongs to "
                "other files, download the model again"
            )
        return self._shards[shard]

    def rows(self, tensor: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor."""
        return self._shard(tensor).rows(tensor, start, stop)

    def state_of(self, tensor: str) -> tuple[str, int, int]:
        """Name, size and time of the file that holds a tensor: what an unfinished extraction is recognised by."""
        stat = self._shard(tensor).path.stat()
        return self._shard_of[tensor], stat.st_size, stat.st_mtime_ns

    def __getitem__(self, tensor: str) -> Spec:
        return self._shard(tensor).spec(tensor)

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._shard_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)


class _RowFile(TensorFile):
    """A safetensors file that also reads some rows of a tensor."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        (dtype, shape), begin, _ = self._entries[name]
        width = math.prod(shape[1:])
        buffer = torch.empty((stop - start) * width, dtype=dtype)
        raw = buffer.view(torch.uint8).numpy().data
        with open(self.path, "rb") as file:
            file.seek(self._start + begin + start * width * dtype.itemsize)
            if file.readinto(raw) != len(raw):
                raise CorruptFileError(f"{self.path}: truncated in tensor {name}; download it again")
        return buffer.reshape(stop - start, *shape[1:])


def extract_reference(
    aligned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int = 64,
    modules: Sequence[str] | str = ALL_LINEAR,
    resume: bool = True,
    progress: bool = True,
) -> CheckpointRecord:
    """Write ``W_aligned - W_base``, cut to ``rank`` directions per module, as a safety reference: a LoRA adapter.

    The adapter loads on the base model with plain PEFT and is accepted wherever a reference is. Beside it
    ``safety_reference.json`` holds the record. A run that was interrupted left its finished modules in a hidden folder
    beside ``output`` and goes on from there.

    Args:
        aligned: the aligned (instruct, chat) model: folder or Hub id.
        base: the same model before alignment.
        output: a new folder.
        rank: directions kept per module; more capture more of the difference. A module with fewer is padded.
        modules: names or ends of names as in PEFT's ``target_modules``, or ``all-linear``: all weight matrices inside
            the blocks.
        resume: go on with an unfinished run of the same files and settings; False starts over.

    Returns:
        The record, with the captured share of every module.

    Raises:
        IncompatibleError: models of different architecture, modules that do not pair up, or no difference at all.
        CorruptFileError: missing shards, a wrong index, NaN or infinite values.
        FileExistsError: the output exists.

    Example:
        >>> extract_reference("org/model-instruct", "org/model", "reference", rank=64)  # doctest: +SKIP
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    output = require_new(output)
    pair = Checkpoint(aligned), Checkpoint(base)
    require_same_geometry(*pair)
    paired, notes = pair_up(*pair, [modules] if isinstance(modules, str) else list(modules))
    unfinished = _open_unfinished(output, _identity(pair, paired, rank), resume)
    found: list[ModuleDelta] = []
    for i, name in enumerate(tqdm(paired, desc="extracting the reference", unit="module", disable=not progress)):
        found.append(_one_module(pair, name, paired[name], rank, unfinished / f"{i}.safetensors"))
    notes += _notes_on(pair, paired, found)
    if not any(module.norm for module in found):
        shutil.rmtree(unfinished)
        raise IncompatibleError(
            f"the two checkpoints hold the same values in all {len(found)} modules, so alignment changed nothing "
            "there; give the model before its alignment as base"
        )
    record = CheckpointRecord(pair[0].model, pair[1].model, rank, tuple(found), notes)
    _write(output, record, unfinished)
    shutil.rmtree(unfinished)
    return record


def models_of(adapter: AdapterFolder) -> tuple[str | None, str | None] | None:
    """Hub ids of the aligned and the base model when an adapter was extracted from checkpoints, else None."""
    text = TensorFile(adapter.path / WEIGHTS_FILE).metadata.get(_METADATA_KEY)
    if text is None:
        return None
    ids = json.loads(text)
    return ids["aligned"], ids["base"]


def require_same_geometry(aligned: Checkpoint, base: Checkpoint) -> None:
    """Raise IncompatibleError where the two configurations describe different architectures."""
    differ = [
        f"{key} is {aligned.config[key]} and {base.config[key]}"
        for key in _GEOMETRY
        if key in aligned.config and key in base.config and aligned.config[key] != base.config[key]
    ]
    if differ:
        raise IncompatibleError(
            f"the aligned and the base model have different architectures: {'; '.join(differ)}; give the aligned "
            "model's own base"
        )


def pair_up(
    aligned: Checkpoint, base: Checkpoint, modules: list[str]
) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    """Module -> its weight's name in both checkpoints, in natural order, and notes on what was not straightforward."""
    chosen, notes = _choose(aligned, modules)
    ends = _by_end(aligned), _by_end(base)
    paired: dict[str, tuple[str, str]] = {}
    renamed: list[str] = []
    lacking: list[str] = []
    for name in chosen:
        other = name if name in base else _renamed(name, *ends) or _tied(name, base)
        if other is None:
            lacking.append(name)
            continue
        if other != name:
            renamed.append(f"{name} as {other}")
        paired[name.removesuffix(".weight")] = name, other
    if lacking:
        raise IncompatibleError(
            f"the base model lacks {len(lacking)} of the {len(chosen)} tensors, first {lacking[0]}; its linear "
            f"modules are {_linear_names(base)}. One of the two is fused or renamed: save both with the same "
            "version and class of transformers"
        )
    if renamed:
        notes += (f"{len(renamed)} tensors have another name in the base model, such as {renamed[0]}",)
    return paired, notes


def _by_end(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Names of tensors by their part from the block's number on, which another prefix leaves as it is."""
    found: dict[str, list[str]] = {}
    for name in checkpoint:
        if end := _BLOCK.search(name):
            found.setdefault(end[0], []).append(name)
    return found


def _renamed(name: str, aligned: Mapping[str, list[str]], base: Mapping[str, list[str]]) -> str | None:
    """The one tensor of the base model that ends alike; None where there is none."""
    end = _BLOCK.search(name)
    if end is None or end[0] not in base:
        return None
    if len(aligned[end[0]]) > 1 or len(base[end[0]]) > 1:
        raise IncompatibleError(
            f"{name} is not in the base model, and which of its tensors is meant cannot be told: "
            f"{' and '.join(aligned[end[0]])} end like {' and '.join(base[end[0]])}. Save both models with the same "
            "version and class of transformers"
        )
    return base[end[0]][0]


def _choose(checkpoint: Checkpoint, modules: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The weights that are asked for, and notes on what was asked for but is no linear module."""
    weights = sorted((name for name in checkpoint if name.endswith(".weight")), key=natural_order)
    notes: list[str] = []
    wanted: dict[str, None] = {}
    for module in modules:
        matching = [name for name in weights if _matches(name, module)]
        found = [name for name in matching if not _is_embedding(name)]
        if module == ALL_LINEAR:
            found = [name for name in found if len(checkpoint[name][1]) == 2]
            notes += _not_linear(checkpoint)
        elif len(found) < len(matching):
            notes.append(f"{module} is an embedding, not a linear module; it was skipped")
        elif not found:
            notes.append(_why_absent(checkpoint, module))
        wanted |= dict.fromkeys(found)
    if not wanted:
        raise IncompatibleError(f"no linear module is left of {', '.join(modules)}: {'; '.join(notes)}")
    odd = [name for name in wanted if len(checkpoint[name][1]) != 2]
    if odd:
        raise IncompatibleError(
            f"{odd[0]} has shape {checkpoint[odd[0]][1]}, expected a matrix (fused experts or a convolution?); leave "
            "it out of modules"
        )
    return list(wanted), tuple(notes)


def _not_linear(checkpoint: Checkpoint) -> list[str]:
    """A note on tensors of the blocks with more than two sides, which are nobody's linear module."""
    odd = [name for name in checkpoint if _BLOCK.search(name) and len(checkpoint[name][1]) > 2]
    return [f"{len(odd)} tensors are no matrices (fused experts or convolutions), first {odd[0]}"] if odd else []


def _why_absent(checkpoint: Checkpoint, module: str) -> str:
    """A note on an output layer that is tied to the embedding; any other module that is not there is an error."""
    if module == "lm_head" and checkpoint.config.get("tie_word_embeddings", True):
        return "lm_head is tied to the embedding and not stored; it was skipped"
    raise IncompatibleError(
        f"no weight of the aligned model matches {module!r}; its linear modules are {_linear_names(checkpoint)}"
    )


def _matches(weight: str, module: str) -> bool:
    name = weight.removesuffix(".weight")
    return bool(_BLOCK.search(weight)) if module == ALL_LINEAR else name == module or name.endswith(f".{module}")


def _is_embedding(weight: str) -> bool:
    return weight.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS


def _linear_names(checkpoint: Checkpoint) -> str:
    inside = [n.removesuffix(".weight").rpartition(".")[2] for n in checkpoint if _matches(n, ALL_LINEAR)]
    names = sorted({name for name in inside if "norm" not in name and not name.startswith("ln_")})
    return ", ".join(f"{n} (fused)" if any(part in n for part in _FUSED) else n for n in names) or "(none)"


def _tied(name: str, checkpoint: Checkpoint) -> str | None:
    """The embedding that stands for an output layer which is tied to it and therefore not stored."""
    if name.removesuffix(".weight").rpartition(".")[2] not in ("lm_head", "embed_out"):
        return None
    return next((n for n in checkpoint if _is_embedding(n) and "wpe" not in n), None)


def _identity(pair: tuple[Checkpoint, Checkpoint], paired: Mapping[str, tuple[str, str]], rank: int) -> str:
    files = [[list(c.state_of(names[side])) for names in paired.values()] for side, c in enumerate(pair)]
    return hashlib.sha256(json.dumps([rank, dict(paired), files]).encode()).hexdigest()


def _open_unfinished(output: Path, identity: str, resume: bool) -> Path:
    """The folder of finished modules beside the output; emptied unless it belongs to this very extraction."""
    folder = output.with_name(f".{output.name}.unfinished")
    mark = folder / "identity"
    if folder.is_dir() and not (resume and mark.is_file() and mark.read_text("utf-8") == identity):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(identity, "utf-8")
    return folder


def _one_module(
    pair: tuple[Checkpoint, Checkpoint], module: str, names: tuple[str, str], rank: int, path: Path
) -> ModuleDelta:
    """Extract one module into ``path``, unless an earlier run did."""
    if not path.is_file():
        update, norm, captured = truncated(_difference(pair, names), rank)
        factors = {"A": update.A.contiguous(), "B": update.B.contiguous()}
        facts = {"norm": repr(norm), "captured": repr(captured)}
        write_tensors(path, {k: (t.dtype, tuple(t.shape)) for k, t in factors.items()}, factors.__getitem__, facts)
    file = TensorFile(path)
    shape = file.spec("B")[1][0], file.spec("A")[1][1]
    return ModuleDelta(module, shape, float(file.metadata["norm"]), float(file.metadata["captured"]))


def _difference(pair: tuple[Checkpoint, Checkpoint], names: tuple[str, str]) -> Tensor:
    """D ``(d_out, d_in)`` in float32, as large as the base weight: its directions are wanted. Read in chunks of rows.

    Rows of a vocabulary that only one of the two models has stay zero.
    """
    (first, (rows, width)), (second, (other_rows, other_width)) = (c[n] for c, n in zip(pair, names, strict=True))
    inside = bool(_BLOCK.search(names[0]))
    if width != other_width or (rows != other_rows and inside):
        raise IncompatibleError(
            f"{names[0]} is {rows} x {width} in the aligned model and {other_rows} x {other_width} in the base model; "
            "give the aligned model's own base"
        )
    for name, dtype in zip(names, (first, second), strict=True):
        if dtype not in _FLOATS:
            raise IncompatibleError(f"{name} is stored as {dtype} (quantised?); give the checkpoint in 16 or 32 bits")
    wide = torch.promote_types(torch.promote_types(first, second), torch.float32)
    D = torch.zeros(rows, width)
    step = max(1, _CHUNK_BYTES // (width * wide.itemsize))
    common = min(rows, other_rows)
    for start in range(0, common, step):
        stop = min(start + step, common)
        one, other = (c.rows(n, start, stop).to(wide) for c, n in zip(pair, names, strict=True))
        D[start:stop] = one - other
        require_finite(D[start:stop], f"the difference in {names[0]}")
    return D.T if inside and pair[0].config.get("model_type") in _TRANSPOSED_TYPES else D


def truncated(D: Tensor, rank: int, *, seed: int = 0) -> tuple[LowRank, float, float]:
    """The best update of ``rank`` directions of a dense D, ``|D|``, and the share of ``|D|^2`` that it captures.

    Exact up to side 1024, above that by subspace iteration from a seeded start with 16 spare directions. No second
    tensor of D's size is made. Missing directions are zeros.
    """
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in D.split(256)))
    if norm == 0.0:
        return LowRank(torch.zeros(rank, D.shape[1]), torch.zeros(len(D), rank)), 0.0, 1.0
    basis = None if min(D.shape) <= max(EXACT_SVD_SIDE, rank + 16) else _leading_outputs(D, rank + 16, seed)
    left, S, right = torch.linalg.svd(D if basis is None else basis.T @ D, full_matrices=False)
    left = left[:, :rank] if basis is None else basis @ left[:, :rank]
    kept = S[:rank]
    root = kept.sqrt()
    pad = rank - len(kept)
    A = torch.nn.functional.pad(root[:, None] * right[:rank], (0, 0, 0, pad))
    B = torch.nn.functional.pad(left * root, (0, pad))
    return LowRank(A, B), norm, min(1.0, float(kept.double().square().sum()) / norm**2)


def _leading_outputs(D: Tensor, width: int, seed: int) -> Tensor:
    start = torch.randn(D.shape[1], width, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(D @ start).Q
    for _ in range(6):
        basis = torch.linalg.qr(D @ torch.linalg.qr(D.T @ basis).Q).Q
    return basis


def _notes_on(
    pair: tuple[Checkpoint, Checkpoint], paired: Mapping[str, tuple[str, str]], found: Sequence[ModuleDelta]
) -> tuple[str, ...]:
    """What a user should know of the tensors that were read."""
    specs = {module: (pair[0][one], pair[1][other]) for module, (one, other) in paired.items()}
    notes: list[str] = []
    for module, ((_, shape), (_, other)) in specs.items():
        if shape[0] != other[0]:
            notes.append(f"{module} has {shape[0]} rows, {other[0]} in the base model; the others were skipped")
    dtypes = sorted({f"{one[0]} minus {other[0]}" for one, other in specs.values() if one[0] != other[0]})
    if dtypes:
        notes.append(f"different dtypes, subtracted in float32 or better: {', '.join(dtypes)}".replace("torch.", ""))
    same = [module.module for module in found if module.norm == 0.0]
    if same:
        notes.append(f"{len(same)} modules are the same in both models, first {same[0]}")
    return tuple(notes)


def _write(output: Path, record: CheckpointRecord, unfinished: Path) -> None:
    """The reference as an adapter that PEFT loads on the base model, with the record beside it."""
    from peft import LoraConfig

    specs: dict[str, Spec] = {}
    sources: dict[str, tuple[Path, str]] = {}
    for i, module in enumerate(record.modules):
        shapes = {"A": (record.rank, module.shape[1]), "B": (module.shape[0], record.rank)}
        for factor, key in zip("AB", factor_keys(module.module), strict=True):
            specs[key], sources[key] = (torch.float32, shapes[factor]), (unfinished / f"{i}.safetensors", factor)
    ids = json.dumps({"aligned": record.aligned, "base": record.base})

    def stored(key: str) -> Tensor:
        path, factor = sources[key]
        return TensorFile(path)[factor]

    def fill(folder: Path) -> None:
        write_tensors(folder / WEIGHTS_FILE, specs, stored, {"format": "pt", _METADATA_KEY: ids})
        LoraConfig(
            r=record.rank,
            lora_alpha=record.rank,
            target_modules=[module.module for module in record.modules],
            task_type="CAUSAL_LM",
            base_model_name_or_path=record.base,
            inference_mode=True,
        ).save_pretrained(str(folder))
        write_json(folder / RECORD_NAME, record.to_dict())

    replace_folder(output, fill)
