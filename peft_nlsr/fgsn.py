"""FGSN, fine-grained safety neurons with continual projection (arXiv 2508.09190); edits rows of B only.

Algorithm, for one safety dimension (one kind of harmful prompts):

1. Safety layers: the window of blocks in which harmful and benign prompts part most.
2. Safety neurons: rows of ``W = W_0 + s B A`` that are important on harmful prompts, less those on utility data.
3. Projection: ``B <- (1 - kappa) B + kappa P B`` in these rows, less the rows of earlier dimensions.

Everything is measured on, and projected from, the *original* adapter, before its first dimension. So dimensions do not
depend on their order, and no row is projected twice. This follows the publication's abstract and secondary
descriptions (its reviews and digests); its full text was not at hand. There is no public code, and q, p and ``Dim``
are not given in what was read: the settings here are ours. Importance hardly depends on the kind of prompts in the
lab, so its dimensions find nearly the same rows. Two scores of ours divide by the score on utility data: ``contrast``
importance, ``update`` how much the adapter's update moves each output.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .blocks import capture, find_blocks, playing, require_active, rows_of, run_block
from .config import CONFIG_NAME, NLSRConfig
from .errors import CalibrationError, PeftNLSRError
from .examples import Example, batches_of, collate
from .files import read_json
from .generation import quiet
from .live_adapter import LiveAdapter
from .lowrank import LowRank
from .offloading import at_hand, input_device
from .projection import Projection, projection_of
from .record import DIFF_NAME, Diff, Realignment, require_record

RECORD_KEY = "fgsn"
CONTINUES = "continues"  # in the record's data, the fingerprint of the adapter that a later dimension was planned for
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Dimension:
    """The neurons of one safety dimension.

    Attributes:
        layers: the blocks that were looked at, counted from 0.
        gaps: how far harmful and benign prompts have parted, before the first block and after each; empty when the
            layers were given.
        rows: module -> ``(d_out,)`` which rows to edit; rows of earlier dimensions are not among them.
        shared: rows that this dimension found, but an earlier one covers.
    """

    layers: tuple[int, ...]
    gaps: tuple[float, ...]
    rows: dict[str, Tensor]
    shared: int


@dataclass(frozen=True)
class Earlier:
    """What earlier FGSN runs did to an adapter.

    Attributes:
        dimensions: as recorded.
        originals: module -> update before the first of them; modules that never changed may be missing.
        fingerprint_before, fingerprint_after: of the original adapter, and of the one they left.
    """

    dimensions: tuple[dict[str, Any], ...]
    originals: Mapping[str, LowRank]
    fingerprint_before: str
    fingerprint_after: str

    @classmethod
    def of(cls, done: Realignment) -> Earlier:
        """From a realignment in memory."""
        return cls(
            tuple(done.data[RECORD_KEY]["dimensions"]),
            done.originals,
            done.fingerprint_before,
            str(done.fingerprint_after),
        )

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Earlier:
        """From the folder of a realigned adapter.

        Raises:
            PeftNLSRError: it holds no FGSN record, or not the original weights.
            CorruptFileError: the record is malformed, or of another schema.
        """
        folder = Path(folder)
        record = read_json(folder / CONFIG_NAME).get("record") if (folder / CONFIG_NAME).is_file() else None
        if not isinstance(record, dict) or RECORD_KEY not in record.get("data", {}):
            raise PeftNLSRError(f"{folder} holds no record of an FGSN run; give the folder that one was saved to")
        require_record(record, folder / CONFIG_NAME)
        if not (folder / DIFF_NAME).is_file():
            raise PeftNLSRError(
                f"{folder} has no {DIFF_NAME}, and a new dimension starts from the original weights that it holds"
            )
        dimensions = tuple(record["data"][RECORD_KEY]["dimensions"])
        return cls(dimensions, Diff(folder), record["fingerprint_before"], record["fingerprint_after"])

    def covered(self) -> dict[str, Tensor]:
        """Module -> rows that some dimension covers."""
        found: dict[str, Tensor] = {}
        for dimension in self.dimensions:
            for name, text in dimension["rows"].items():
                rows = unpack_rows(text, self.originals[name].shape[0])
                found[name] = found[name] | rows if name in found else rows
        return found


@dataclass(frozen=True)
class Addition:
    """One more dimension for an adapter.

    Attributes:
        updates: module -> new update, of all modules that any dimension has changed.
        originals: module -> update before the first dimension, of all modules.
        data: for the record, JSON values.
        notes: sentences that a user should read.
    """

    updates: dict[str, LowRank]
    originals: dict[str, LowRank]
    data: dict[str, Any]
    notes: tuple[str, ...]


def add_dimension(
    adapter: LiveAdapter,
    delta: Mapping[str, LowRank],
    harmful: Sequence[Example],
    utility: Sequence[Example],
    *,
    earlier: Earlier | None,
    config: NLSRConfig,
    pad_id: int = 0,
    progress: bool = True,
) -> Addition:
    """Find and edit the rows of one safety dimension; see :func:`find_dimension` for the data and the errors.

    Args:
        delta: module -> what alignment changed.
        earlier: the runs that this one continues.

    Raises:
        PeftNLSRError: the dimension is there already.
    """
    done = earlier.dimensions if earlier else ()
    _require_new(config.safety_dimension, [dimension["name"] for dimension in done])
    current = adapter.snapshot()
    originals = {**current, **earlier.originals} if earlier else current
    covered = earlier.covered() if earlier else {}
    dimension = find_dimension(
        adapter,
        harmful,
        utility,
        originals=originals,
        covered=covered,
        config=config,
        pad_id=pad_id,
        progress=progress,
    )
    updates = {name: current[name] for name in covered}
    edited: dict[str, Tensor] = {}
    for name, rows in dimension.rows.items():
        projection = projection_of(delta[name], config) if bool(rows.any()) else None
        if projection is not None:
            updates[name] = edit_rows(current[name], originals[name], rows, projection, config.kappa)
            edited[name] = rows
    entry = recorded(replace(dimension, rows=edited), originals, config)
    data: dict[str, Any] = {RECORD_KEY: {"dimensions": [*done, entry]}}
    if earlier:
        data[CONTINUES] = earlier.fingerprint_after
    return Addition(updates, originals, data, (_edits_said(entry), *_notes(dimension, edited)))


def _require_new(name: str, names: Sequence[str]) -> None:
    if name in names:
        raise PeftNLSRError(
            f"the adapter has the safety dimension {name!r} already (it has {', '.join(names)}); name the new one by "
            "safety_dimension, or revert first"
        )


def _edits_said(entry: Mapping[str, Any]) -> str:
    covered = entry["rows_of_earlier_dimensions"]
    return (
        f"safety dimension {entry['name']!r} edits {entry['edited_rows']} rows in the blocks "
        f"{_said(entry['layers'])}: {entry['edited_share']:.2%} of the updates' entries, "
        f"{entry['edited_parameters']:.2%} of A and B"
        + (f"; earlier dimensions cover {covered} more of its rows" if covered else "")
    )


def _notes(dimension: Dimension, edited: Mapping[str, Tensor]) -> tuple[str, ...]:
    notes: list[str] = []
    unchanged = [name for name, rows in dimension.rows.items() if bool(rows.any()) and name not in edited]
    if unchanged:
        notes.append(
            f"alignment did not change {len(unchanged)} modules, first {unchanged[0]}, so there is nothing to project "
            "onto and they are left alone"
        )
    if not edited:
        why = f"{dimension.shared} rows were found, but earlier dimensions cover them"
        if not dimension.shared:
            why = "no row to project was found"
        notes.append(f"no row was edited: {why}; a larger harmful_rows or smaller utility_rows finds more")
    return tuple(notes)


def find_dimension(
    adapter: LiveAdapter,
    harmful: Sequence[Example],
    utility: Sequence[Example],
    *,
    originals: Mapping[str, LowRank],
    covered: Mapping[str, Tensor],
    config: NLSRConfig,
    pad_id: int = 0,
    progress: bool = True,
) -> Dimension:
    """The rows to edit for one kind of harmful prompts; the model is left as it was.

    Args:
        adapter: active and alone on the model.
        harmful: prompts of the dimension, answered or not.
        utility: benign prompts, best the user's own data with answers.
        originals: module -> update before any dimension; the model computes with these.
        covered: module -> ``(d_out,)`` rows of earlier dimensions.
        config: the FGSN settings, ``calibration_tokens``, ``nlsr_batch_size`` and ``nlsr_seed`` are read.

    Raises:
        CalibrationError: fewer than two benign prompts for the choice of layers, or data without usable tokens.
        UnsupportedAdapterError: the model has no single list of blocks, or routes its tokens.
        ValueError: ``safety_layers`` names a block that the model does not have.
    """
    require_active(adapter)
    blocks = [block for _, block in find_blocks(adapter)]
    data = {
        "harmful": _Batches(adapter, harmful, config, pad_id),
        "utility": _Batches(adapter, utility, config, pad_id),
    }
    with quiet(adapter.model), torch.no_grad(), playing(adapter, originals, originals):
        layers, gaps = _safety_layers(blocks, data, config)
        inside = {id(m) for i in layers for m in blocks[i].modules()}
        names = [name for name, layer in adapter.layers.items() if id(layer) in inside]
        if not names:
            raise CalibrationError(
                f"no LoRA module lies in the blocks {_said(layers)}; choose others by safety_layers"
            )
        seen = _Seen(adapter, originals, names, config)
        harm, use = (seen.on(b, blocks[: layers[-1] + 1]) for b in data.values())
        rows: dict[str, Tensor] = {}
        shared = 0
        generator = torch.Generator().manual_seed(config.nlsr_seed)
        for name in tqdm(names, desc="safety neurons", unit="module", disable=not progress):
            found = neurons(seen.scores(name, harm[name], use[name]), config)
            free = ~covered.get(name, torch.zeros(len(found), dtype=torch.bool))
            shared += int((found & ~free).sum())
            rows[name] = _as_many(found & free, free, generator) if config.neuron_score == "random" else found & free
    return Dimension(layers, gaps, rows, shared)


def neurons(scores: Tensor, config: NLSRConfig) -> Tensor:
    """``(d_out,)`` the top ``harmful_rows`` on harmful data less the top ``utility_rows`` on utility data.

    Args:
        scores: ``(d_out, 2)`` on harmful and on utility data; ``contrast`` and ``update`` rank by their ratio. Rows
            that score zero on harmful data are never found.
    """
    harm, use = scores.unbind(dim=1)
    relative = config.neuron_score in ("contrast", "update")
    ranked = harm / use.clamp_min(torch.finfo(use.dtype).tiny) if relative else harm
    return top_rows(ranked, config.harmful_rows) & ~top_rows(use, config.utility_rows) & (harm > 0)


def edit_rows(current: LowRank, original: LowRank, rows: Tensor, projection: Projection, kappa: float) -> LowRank:
    """The update whose given rows of B are ``(1 - kappa) B + kappa P B`` of the original's, the others as they are."""
    start = original.B.to(projection.U)
    projected = (1.0 - kappa) * start + kappa * projection.times(start)
    return LowRank(current.A.cpu(), torch.where(rows[:, None], projected, current.B.to(start)), current.scale)


def row_scores(layer: Any, update: LowRank, input_norms: Tensor) -> Tensor:
    """``sum_v |W_uv| |X_v|`` for ``W = W_0 + s B A``: ``(d_out, k)`` from norms of inputs ``(d_in, k)``.

    Wanda (arXiv 2306.11695) summed over each output neuron. A few rows of W exist at a time.
    """
    from peft.utils.integrations import dequantize_module_weight

    with at_hand(layer.get_base_layer()):
        weight: Any = dequantize_module_weight(layer.get_base_layer())
    weight = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    A, norms = update.A.to(weight.device).float(), input_norms.to(weight.device).float()
    scores: list[Tensor] = []
    for part, B in zip(weight.split(_ROWS_AT_ONCE), update.B.split(_ROWS_AT_ONCE), strict=True):
        W = part.float() + update.scale * (B.to(weight.device).float() @ A)
        scores.append((W.abs() @ norms).cpu())
    return torch.cat(scores)


def update_scores(update: LowRank, grams: Sequence[Tensor]) -> Tensor:
    """``(d_out, k)`` norms of each output of ``s B A x`` over the tokens of k data sets; never forms ``B A``.

    Args:
        grams: per data set ``sum (A x) (A x)^T``, ``(r, r)``. Differs from the publication, which scores ``W``.
    """
    B = update.B.double().cpu()
    squares = [((B @ gram.to(B)) * B).sum(dim=1) for gram in grams]
    return abs(update.scale) * torch.stack(squares, dim=1).clamp_min(0.0).sqrt()


def top_rows(scores: Tensor, share: float) -> Tensor:
    """``(n,)`` True on the ``round(share * n)`` largest; ties go to the earlier row."""
    order = scores.argsort(descending=True, stable=True)
    found = torch.zeros(len(scores), dtype=torch.bool)
    found[order[: round(share * len(scores))]] = True
    return found


def safety_window(gaps: Sequence[float], width: int) -> range:
    """The ``width`` neighbouring blocks over which the gap increases most; ties go to the earlier window.

    Args:
        gaps: ``gaps[0]`` before the first block, ``gaps[i + 1]`` after block ``i``.
    """
    width = min(width, len(gaps) - 1)
    increases = [gaps[i + width] - gaps[i] for i in range(len(gaps) - width)]
    start = max(range(len(increases)), key=lambda i: increases[i])
    return range(start, start + width)


def parse_layers(text: str, blocks: int) -> tuple[int, ...]:
    """``"3,5,7-9"`` as ``(3, 5, 7, 8, 9)``."""
    named = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        named.append(range(int(first), int(last or first) + 1))
    found = set().union(*named)
    if not all(named) or max(found) >= blocks:
        raise ValueError(f"safety_layers={text!r} must name some of the blocks 0 to {blocks - 1}, first-last upwards")
    return tuple(sorted(found))


def pack_rows(rows: Tensor) -> str:
    """A row mask as hexadecimal text, eight rows to a byte."""
    return bytes(np.packbits(rows.numpy())).hex()


def unpack_rows(text: str, count: int) -> Tensor:
    """The inverse of :func:`pack_rows`."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count)
    return torch.from_numpy(bits).bool()


def recorded(dimension: Dimension, originals: Mapping[str, LowRank], config: NLSRConfig) -> dict[str, Any]:
    """A dimension as JSON values, with what share of the adapter it edits.

    ``edited_share`` counts entries of the updates (a row of B changes a row of ``dW``), ``edited_parameters`` entries
    of A and B; both of all modules of the adapter.
    """
    counts = {name: int(mask.sum()) for name, mask in dimension.rows.items()}
    entries = sum(u.shape[0] * u.shape[1] for u in originals.values())
    parameters = sum(u.A.numel() + u.B.numel() for u in originals.values())
    return {
        "name": config.safety_dimension,
        "layers": list(dimension.layers),
        "gaps": [round(gap, 6) for gap in dimension.gaps],
        "settings": {
            key: getattr(config, key)
            for key in ("normaliser", "subspace_share", "kappa", "harmful_rows", "utility_rows", "neuron_score")
        },
        "rows": {name: pack_rows(mask) for name, mask in dimension.rows.items()},
        "edited_rows": sum(counts.values()),
        "rows_of_earlier_dimensions": dimension.shared,
        "edited_share": sum(n * originals[name].shape[1] for name, n in counts.items()) / entries,
        "edited_parameters": sum(n * originals[name].rank for name, n in counts.items()) / parameters,
    }


class _Batches:
    """Examples as batches on the model's device, whole or only up to where the answer begins."""

    def __init__(self, adapter: LiveAdapter, examples: Sequence[Example], config: NLSRConfig, pad_id: int) -> None:
        self.model, self._examples = adapter.model, examples
        self._size, self._pad_id = config.nlsr_batch_size, pad_id

    def whole(self) -> Iterator[dict[str, Tensor]]:
        return self._collated(self._examples)

    def prompts(self) -> Iterator[dict[str, Tensor]]:
        return self._collated([Example(e.prompt or e.answer, ()) for e in self._examples])

    def _collated(self, examples: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        device = input_device(self.model)
        return (collate(batch, self._pad_id, device) for batch in batches_of(examples, self._size))


def _safety_layers(
    blocks: Sequence[nn.Module], data: Mapping[str, _Batches], config: NLSRConfig
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if config.safety_layers != "auto":
        return parse_layers(config.safety_layers, len(blocks)), ()
    gaps = hidden_gaps(*(_directions(blocks, data[kind]) for kind in ("harmful", "utility")))
    return tuple(safety_window(gaps, max(1, round(config.safety_layer_share * len(blocks))))), gaps


def hidden_gaps(harmful: tuple[Tensor, int], benign: tuple[Tensor, int]) -> tuple[float, ...]:
    """Mean cosine of two benign prompts minus that of a benign and a harmful one, at each depth, over all pairs.

    Args:
        harmful, benign: the sum ``(depths, d)`` of the unit hidden states of their last tokens, and their number.
    """
    (h, n_h), (b, n_b) = harmful, benign
    if n_b < 2 or n_h < 1:
        raise CalibrationError(
            f"the choice of layers compares harmful with at least two benign prompts, found {n_h} and {n_b}; give "
            "more data, or name the blocks by safety_layers"
        )
    alike = (b.square().sum(dim=1) - n_b) / (n_b * (n_b - 1))
    return tuple((alike - (b * h).sum(dim=1) / (n_b * n_h)).tolist())


def _directions(blocks: Sequence[nn.Module], batches: _Batches) -> tuple[Tensor, int]:
    """Sum of the unit hidden states of the last prompt tokens, before the first block and after each."""
    total: Tensor | None = None
    count = 0
    for batch in batches.prompts():
        seen = capture(batches.model, blocks, batch, keep=True)
        states = [*seen.inputs, run_block(blocks[-1], seen.inputs[-1], seen.arguments[-1])]
        last = (batch["attention_mask"].sum(dim=1) - 1).cpu()
        ends = torch.stack([s.cpu()[torch.arange(len(last)), last].double() for s in states])
        part = torch.nn.functional.normalize(ends, dim=-1).sum(dim=1)
        total = part if total is None else total + part
        count += len(last)
    return (torch.zeros(len(blocks) + 1, 1) if total is None else total), count


class _Seen:
    """What the scores need of a module's inputs: sums of squares, or for ``update`` the Gram matrix of ``A x``."""

    def __init__(
        self, adapter: LiveAdapter, originals: Mapping[str, LowRank], names: Sequence[str], config: NLSRConfig
    ) -> None:
        self._adapter, self._originals, self._names = adapter, originals, names
        self._answers_only = config.calibration_tokens == "response"
        self._of_update = config.neuron_score == "update"

    def scores(self, name: str, harm: Tensor, use: Tensor) -> Tensor:
        """``(d_out, 2)`` from what :meth:`on` found on harmful and on utility data."""
        if self._of_update:
            return update_scores(self._originals[name], [harm, use])
        norms = torch.stack([harm, use], dim=1).sqrt()
        return row_scores(self._adapter.layers[name], self._originals[name], norms)

    def on(self, batches: _Batches, blocks: Sequence[nn.Module]) -> dict[str, Tensor]:
        """Module -> sum over the tokens that count; each forward pass ends with the last of the blocks."""
        sums: dict[str, Tensor] = {}
        counted = torch.zeros(0, dtype=torch.bool)
        tokens = 0

        def note(name: str, x: Tensor) -> None:
            rows = rows_of(x, counted, name, instead="choose other blocks by safety_layers")
            part = self._part(name, rows.float())
            sums[name] = sums[name] + part if name in sums else part

        with _noting(self._adapter, self._names, note):
            for batch in batches.whole():
                kept = batch["attention_mask"].bool()
                counted = (kept & (batch["labels"] != -100) if self._answers_only else kept).flatten()
                tokens += int(counted.sum())
                seen = capture(self._adapter.model, blocks, batch, keep=True)
                run_block(blocks[-1], seen.inputs[-1], seen.arguments[-1])
        silent = [name for name in self._names if name not in sums]
        if tokens == 0 or silent:
            raise CalibrationError(
                f"{'no module' if tokens == 0 else silent[0]} saw a usable token; with calibration_tokens='response' "
                "the data need answers"
            )
        return sums

    def _part(self, name: str, x: Tensor) -> Tensor:
        if not self._of_update:
            return x.square().sum(dim=0).double().cpu()
        reduced = x @ self._originals[name].A.to(x).T
        return (reduced.T @ reduced).double().cpu()


@contextmanager
def _noting(adapter: LiveAdapter, names: Sequence[str], note: Any) -> Iterator[None]:
    layers: dict[str, Any] = dict(adapter.layers)
    handles = [
        layers[name].register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_many(found: Tensor, free: Tensor, generator: torch.Generator) -> Tensor:
    """As many random rows as were found, among the free ones."""
    pool = free.nonzero().flatten()
    rows = torch.zeros_like(found)
    rows[pool[torch.randperm(len(pool), generator=generator)[: int(found.sum())]]] = True
    return rows


def _said(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
