"""Calibration: one streaming pass over data, small sums per LoRA module. The only file that gathers statistics.

Sums, not activations: a file of statistics serves every score, sparsity and rank. Inputs are read by a forward
pre-hook on the LoRA layer, ``z = A x`` is computed here, so variants that bypass ``lora_A`` are measured too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .blocks import Factors, capture, find_blocks, playing, prove_chain, require_active, run_block
from .config import NLSRConfig
from .edits import masked
from .errors import CalibrationError, CorruptFileError, IncompatibleError, PeftNLSRError, UnsupportedAdapterError
from .files import read_json, write_json
from .generation import quiet
from .gradients import gradient_sums
from .live_adapter import LiveAdapter
from .lowrank import LowRank
from .offloading import held, input_device
from .reference import Reference
from .scores import ModuleStatistics, Moment, low_rank_factors, rank_kept, safety_masks
from .storage import TensorFile, write_tensors

SCHEMA_VERSION = 1
TENSORS_NAME = "safety_statistics.safetensors"
RECORD_NAME = "safety_statistics.json"
_PAIRS_NEEDED = (
    "preference_snip needs batches {'chosen': batch, 'rejected': batch}, which are not made from rows of data: give "
    "them to collect_statistics(..., gradients='preference_snip') and build the patch from what it returns with "
    "build_nlsr_patch, or take another score"
)


class SafetyStatistics(Mapping[str, ModuleStatistics]):
    """Module -> :class:`ModuleStatistics`, with a record of where they come from.

    ``record`` holds JSON values: schema_version, base_model, calibration_tokens, calibration_model, gradients,
    samples.
    """

    def __init__(self, modules: Mapping[str, ModuleStatistics], record: Mapping[str, Any]) -> None:
        self._modules = dict(modules)
        self.record = dict(record)

    def __getitem__(self, module: str) -> ModuleStatistics:
        return self._modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def require_modules(self, reference: Mapping[str, LowRank]) -> None:
        """Raise IncompatibleError unless these statistics fit the reference's modules and ranks."""
        missing = sorted(set(reference) - set(self))
        if missing:
            raise IncompatibleError(
                f"the statistics lack {len(missing)} modules, first {missing[0]}; collect them for this adapter"
            )
        for name, update in reference.items():
            if len(self[name].z_gram) != update.rank or len(self[name].x_square) != update.shape[1]:
                raise IncompatibleError(
                    f"statistics of {name} are for rank {len(self[name].z_gram)} and {len(self[name].x_square)} "
                    f"inputs, the reference has rank {update.rank} and {update.shape[1]}; collect them for this "
                    "reference"
                )

    def save(self, folder: str | Path) -> None:
        """Write ``safety_statistics.safetensors`` and ``safety_statistics.json`` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.{kind}": t for name, s in self.items() for kind, t in _tensors_of(s).items()}
        counts = {
            name: {"tokens": s.tokens, "sketch_error": s.moment.error if s.moment else 0.0} for name, s in self.items()
        }
        write_tensors(
            folder / TENSORS_NAME, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.__getitem__
        )
        write_json(folder / RECORD_NAME, {**self.record, "modules": counts})

    @classmethod
    def load(cls, folder: str | Path) -> SafetyStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            PeftNLSRError: the folder holds no statistics; CorruptFileError: they are damaged, or of another version.
        """
        folder = Path(folder)
        for name in (RECORD_NAME, TENSORS_NAME):
            if not (folder / name).is_file():
                raise PeftNLSRError(f"{folder} holds no statistics: it has no {name}; collect them with `calibrate`")
        record = read_json(folder / RECORD_NAME)
        if record.get("schema_version") != SCHEMA_VERSION:
            raise CorruptFileError(
                f"{folder / RECORD_NAME} has schema {record.get('schema_version')}, this version reads "
                f"{SCHEMA_VERSION}"
            )
        file = TensorFile(folder / TENSORS_NAME)
        try:
            counts = record.pop("modules")
            return cls({name: _statistics_from(file, name, count) for name, count in counts.items()}, record)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(
                f"{TENSORS_NAME} and {RECORD_NAME} in {folder} do not belong together, or lack a part ({error}); copy "
                "both again, or collect the statistics again"
            ) from error


def _tensors_of(statistics: ModuleStatistics) -> dict[str, Tensor]:
    moment = statistics.moment
    found = {
        "z_gram": statistics.z_gram,
        "x_square": statistics.x_square,
        "grad_A": statistics.grad_A,
        "grad_B": statistics.grad_B,
        "moment": moment.full if moment else None,
        "moment_rows": moment.rows if moment else None,
        "x_code": statistics.x_code,
    }
    return {kind: tensor for kind, tensor in found.items() if tensor is not None}


def _statistics_from(file: TensorFile, name: str, count: Mapping[str, Any]) -> ModuleStatistics:
    def read(kind: str) -> Tensor | None:
        return file[f"{name}.{kind}"] if f"{name}.{kind}" in file.names else None

    full, rows = read("moment"), read("moment_rows")
    moment = None if full is None and rows is None else Moment(full=full, rows=rows, error=count["sketch_error"])
    return ModuleStatistics(
        count["tokens"],
        file[f"{name}.z_gram"],
        file[f"{name}.x_square"],
        read("grad_A"),
        read("grad_B"),
        moment,
        read("x_code"),
    )


class FrequentDirections:
    """Streaming sketch ``S (rows, d_in)`` with ``S^T S <= X^T X`` (Liberty 2013; Ghashami et al. 2016).

    ``shrunk`` bounds the largest eigenvalue of ``X^T X - S^T S``; it is measured, not estimated.
    """

    def __init__(self, d_in: int, rows: int) -> None:
        self.rows = rows
        self.buffer = torch.zeros(0, d_in, dtype=torch.float64)
        self.shrunk = 0.0
        self.total = 0.0

    def add(self, x: Tensor) -> None:
        """Add rows ``x (n, d_in)``; every ``2 * rows`` the sketch is cut back to ``rows``."""
        for chunk in x.double().cpu().split(self.rows):
            self.total += float(chunk.square().sum())
            self.buffer = torch.cat([self.buffer, chunk])
            if len(self.buffer) > 2 * self.rows:
                self._shrink()

    def _shrink(self) -> None:
        values, vectors = torch.linalg.eigh(self.buffer @ self.buffer.T)
        values, vectors = values[-self.rows - 1 :], vectors[:, -self.rows :]
        lost = max(float(values[0]), 0.0)
        kept = (values[1:] - lost).clamp_min(0.0)
        self.shrunk += lost
        factor = (kept / values[1:].clamp_min(torch.finfo(values.dtype).tiny)).sqrt()
        self.buffer = factor[:, None] * (vectors.T @ self.buffer)

    def moment(self) -> Moment:
        """The sketch with its error bound."""
        if len(self.buffer) > self.rows:
            self._shrink()
        return Moment(rows=self.buffer, error=self.shrunk / self.total if self.total else 0.0)


@dataclass
class _Sums:
    """Running sums of one module."""

    update: LowRank
    tokens: int = 0
    z_gram: Tensor | None = None
    x_square: Tensor | None = None
    grad_A: Tensor | None = None
    grad_B: Tensor | None = None
    x_code: Tensor | None = None
    full: Tensor | None = None
    sketch: FrequentDirections | None = None

    def add(self, x: Tensor, codes: bool, moments: bool, sketch_above: int, sketch_rows: int) -> None:
        """Count token rows ``x (n, d_in)``."""
        x = x.float()
        z = x @ self.update.A.to(x).T
        self.tokens += len(x)
        self.z_gram = _plus(self.z_gram, z.T @ z)
        self.x_square = _plus(self.x_square, x.square().sum(dim=0))
        if codes:
            self.x_code = _plus(self.x_code, x.T @ z)
        if moments and x.shape[1] <= sketch_above:
            self.full = _plus(self.full, x.T @ x)
        elif moments:
            self.sketch = self.sketch or FrequentDirections(x.shape[1], sketch_rows)
            self.sketch.add(x)

    def finish(self, name: str) -> ModuleStatistics:
        if self.tokens == 0 or self.z_gram is None or self.x_square is None:
            raise CalibrationError(
                f"{name} saw no calibration tokens: it never ran (fused kernels, routed experts) or every token was "
                "masked; check the data's attention_mask and labels, or leave the module out of the adapter"
            )
        moment = self.sketch.moment() if self.sketch else Moment(full=self.full) if self.full is not None else None
        return ModuleStatistics(self.tokens, self.z_gram, self.x_square, self.grad_A, self.grad_B, moment, self.x_code)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    part = part.detach().to("cpu", torch.float64)
    return part if total is None else total + part


@dataclass
class _TokenMask:
    """Which rows of a module's input count, for the batch in flight."""

    tokens: str
    encoder: Tensor | None = None
    decoder: Tensor | None = None
    encoder_output: Tensor | None = None

    def set(self, batch: Mapping[str, Tensor], seq2seq: bool) -> None:
        labels = batch.get("labels")
        ids = batch["input_ids"]
        attended = batch.get("attention_mask", torch.ones_like(ids)).bool()
        answered = None if labels is None else labels != -100
        if self.tokens == "response" and (answered is None or answered.ndim != 2):
            raise CalibrationError(
                "calibration_tokens='response' needs labels (-100 outside the answer) in each batch"
            )
        if seq2seq:
            self.encoder = attended
            self.decoder = batch["decoder_attention_mask"].bool() if "decoder_attention_mask" in batch else answered
            if self.decoder is None and "decoder_input_ids" in batch:
                self.decoder = torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)
        else:
            self.decoder = attended & answered if self.tokens == "response" and answered is not None else attended

    def rows(self, x: Tensor, name: str) -> Tensor:
        """Rows ``(n, d_in)`` of ``x (batch, tokens, d_in)`` or ``(batch * tokens, d_in)`` that count."""
        candidates = [m for m in (self.decoder, self.encoder) if m is not None and m.numel() == x[..., 0].numel()]
        if not candidates:
            raise UnsupportedAdapterError(
                f"{name} received {x[..., 0].numel()} rows, which is not the number of tokens in the batch (routed or "
                "merged tokens); leave it out of the adapter"
            )
        mask = candidates[0]
        if len(candidates) == 2 and self._from_encoder(x):
            mask = candidates[1]
        return x.reshape(-1, x.shape[-1])[mask.reshape(-1).to(x.device)]

    def _from_encoder(self, x: Tensor) -> bool:
        """Inside the encoder, or cross-attention reading the encoder's output."""
        return self.encoder_output is None or x.data_ptr() == self.encoder_output.data_ptr()


@dataclass
class _Pass:
    """One calibration pass: its sums and its hooks."""

    sums: dict[str, _Sums]
    mask: _TokenMask
    codes: bool
    moments: bool = False
    sketch_above: int = 0
    sketch_rows: int = 0

    @contextmanager
    def hooks(self, layers: Mapping[str, Any], encoder: nn.Module | None) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: self._note(name, args[0]))
            for name, layer in layers.items()
        ]
        if encoder is not None:
            handles.append(encoder.register_forward_pre_hook(lambda *_: setattr(self.mask, "encoder_output", None)))
            handles.append(
                encoder.register_forward_hook(lambda m, a, out: setattr(self.mask, "encoder_output", out[0]))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, x: Tensor) -> None:
        rows = self.mask.rows(x.detach(), name)
        self.sums[name].add(rows, self.codes, self.moments, self.sketch_above, self.sketch_rows)

    def finish(self) -> dict[str, ModuleStatistics]:
        return {name: sums.finish(name) for name, sums in self.sums.items()}


def collect_statistics(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str | None = None,
    factors: Factors = None,
    run_with_factors: bool = False,
    tokens: str = "all",
    gradients: str | None = None,
    codes: bool = False,
    moments: bool = False,
    sketch_above: int = 2048,
    sketch_rows: int = 256,
    progress: bool = True,
) -> SafetyStatistics:
    """Sufficient statistics of every LoRA module from one pass over the data; the model is left as it was.

    Args:
        model: a PeftModel (or LiveAdapter) of any architecture that PEFT puts LoRA on.
        batches: collated batches: ``input_ids``, ``attention_mask`` (its zeros never count), ``labels``, and what
            else the model's forward takes. For ``preference_snip``: ``{"chosen": batch, "rejected": batch}``.
        factors: module -> update whose A makes the code ``z = A x``; the adapter's own when None.
        run_with_factors: the model also computes with ``factors`` (the papers' identification) instead of its own.
        tokens: ``all`` attended tokens, or the ``response`` (labels that are not -100).
        gradients: None, ``snip`` or ``preference_snip``: also sum absolute per-sample gradients.
        codes: also sum ``x z^T``, by which a patch cuts ``sum`` to the adapter's rank (:class:`InputSketch`).
        moments: also keep the inputs' second moments, exact up to ``sketch_above`` inputs, else as a
            frequent-directions sketch of ``sketch_rows`` rows with its measured error bound.

    Raises:
        CalibrationError: no batches, or a module that saw no token.
        IncompatibleError: the adapter is not the one that the model computes with.
    """
    if gradients not in (None, "snip", "preference_snip"):
        raise ValueError(f"gradients={gradients!r} is not one of None, snip, preference_snip")
    adapter = model if isinstance(model, LiveAdapter) else LiveAdapter(model, adapter_name)
    require_active(adapter)
    used = adapter.snapshot() if factors is None else dict(factors)
    running = _Pass(
        {n: _Sums(used[n]) for n in adapter.layers}, _TokenMask(tokens), codes, moments, sketch_above, sketch_rows
    )
    seq2seq = bool(getattr(getattr(adapter.model, "config", None), "is_encoder_decoder", False))
    encoder = adapter.model.get_encoder() if seq2seq else None
    samples = 0
    with ExitStack() as stack:
        stack.enter_context(quiet(adapter.model))
        if run_with_factors:
            stack.enter_context(playing(adapter, used, used))
        for batch in tqdm(batches, desc="calibration", unit="batch", disable=not progress):
            samples += _one_batch(adapter, running, batch, encoder, gradients)
    if samples == 0:
        raise CalibrationError("the calibration data are empty: no batch was given")
    used_by = "reference" if run_with_factors else "tuned"
    return SafetyStatistics(running.finish(), _record(adapter, tokens, used_by, gradients, samples))


def _record(adapter: LiveAdapter, tokens: str, used_by: str, gradients: str | None, samples: int) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "base_model": adapter.info.base_model,
        "calibration_tokens": tokens,
        "calibration_model": used_by,
        "gradients": gradients,
        "samples": samples,
    }


def _one_batch(
    adapter: LiveAdapter, running: _Pass, batch: Mapping[str, Any], encoder: nn.Module | None, gradients: str | None
) -> int:
    device = input_device(adapter.model)
    if gradients == "preference_snip" and not {"chosen", "rejected"} <= set(batch):
        raise CalibrationError(f"{_PAIRS_NEEDED}; found the keys {', '.join(sorted(batch))}")
    plain = _on(batch["chosen"] if gradients == "preference_snip" else batch, device)
    running.mask.set(plain, encoder is not None)
    with running.hooks(adapter.layers, encoder), torch.no_grad():
        adapter.model(**plain)
    if gradients is not None:
        pairs = {part: _on(batch[part], device) for part in ("chosen", "rejected")} if gradients != "snip" else plain
        for name, (a, b) in gradient_sums(adapter, pairs, gradients).items():
            sums = running.sums[name]
            sums.grad_A, sums.grad_B = _plus(sums.grad_A, a), _plus(sums.grad_B, b)
    return len(plain["input_ids"])


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}


def collect_sequential(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    factors: Factors,
    config: NLSRConfig,
    adapter_name: str | None = None,
    progress: bool = True,
) -> SafetyStatistics:
    """Like :func:`collect_statistics`, each block calibrated on a model whose earlier blocks are already reduced.

    The release works in this order; here it costs two sweeps over each block instead of one pass of the whole model
    per block. The model runs with ``factors``; a finished block runs with its low-rank factors (``low_rank``) or with
    what its masks keep (``wanda``).

    Raises:
        ValueError: another score, for which the release's order has no forward pass of its own.
    """
    _require_sequential(config)
    adapter = model if isinstance(model, LiveAdapter) else LiveAdapter(model, adapter_name)
    require_active(adapter)
    used = adapter.snapshot() if factors is None else dict(factors)
    running = _Pass(
        {n: _Sums(used[n]) for n in adapter.layers}, _TokenMask(config.calibration_tokens), needs_codes(config)
    )
    names = {id(layer): name for name, layer in adapter.layers.items()}
    blocks = find_blocks(adapter)
    modules = [block for _, block in blocks]
    with quiet(adapter.model), torch.no_grad(), playing(adapter, used, used):
        plain = [_on(batch, input_device(adapter.model)) for batch in batches]
        if not plain:
            raise CalibrationError("the calibration data are empty: no batch was given")
        prove_chain(adapter.model, modules, plain[0])
        seen = [capture(adapter.model, modules, batch) for batch in plain]
        hidden = [inputs.hidden for inputs in seen]
        for index, block in enumerate(
            tqdm(modules, desc="sequential calibration", unit="block", disable=not progress)
        ):
            inside = {names[id(m)]: m for m in block.modules() if id(m) in names}
            arguments = [inputs.arguments[index] for inputs in seen]
            with held(block):
                with running.hooks(inside, None):
                    for state, given, batch in zip(hidden, arguments, plain, strict=True):
                        running.mask.set(batch, False)
                        run_block(block, state, given)
                reduced = {name: _reduced(used[name], running.sums[name].finish(name), config) for name in inside}
                with playing(adapter, reduced, reduced):
                    hidden = [run_block(block, *each) for each in zip(hidden, arguments, strict=True)]
    samples = sum(len(batch["input_ids"]) for batch in plain)
    return SafetyStatistics(running.finish(), _record(adapter, config.calibration_tokens, "reference", None, samples))


def _require_sequential(config: NLSRConfig) -> None:
    if config.score not in ("low_rank", "wanda"):
        raise ValueError(f"sequential=True needs score low_rank or wanda, got {config.score!r}")


def _reduced(update: LowRank, statistics: ModuleStatistics, config: NLSRConfig) -> LowRank:
    if config.score == "low_rank":
        A, B = low_rank_factors(update, statistics.z_gram, rank_kept(update.rank, config))
        return LowRank(A, B, update.scale)
    return masked(update, safety_masks(update, statistics, config, generator=torch.Generator()))


def calibrate(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    reference: Reference,
    config: NLSRConfig,
    *,
    progress: bool = True,
) -> SafetyStatistics:
    """Statistics of a pre-amplified reference as the config asks: whose activations, which tokens, which order.

    Raises:
        ValueError: ``sequential`` with another model than the reference, or with a score that has no such order.
    """
    if config.sequential:
        _require_sequential(config)
        if config.calibration_model != "reference":
            raise ValueError(
                "sequential=True calibrates the reference block by block, found calibration_model="
                f"{config.calibration_model!r}; set calibration_model='reference' too, or sequential=False"
            )
        return collect_sequential(model, batches, factors=reference.updates, config=config, progress=progress)
    return collect_statistics(
        model,
        batches,
        factors=reference.updates,
        run_with_factors=config.calibration_model == "reference",
        tokens=config.calibration_tokens,
        gradients=config.score if config.score in ("snip", "preference_snip") else None,
        codes=needs_codes(config),
        progress=progress,
    )


def require_no_pairs(config: NLSRConfig) -> None:
    """Raise CalibrationError for the score that rows of data, as callers give them, are not enough for."""
    if config.score == "preference_snip":
        raise CalibrationError(_PAIRS_NEEDED)


def needs_codes(config: NLSRConfig) -> bool:
    """Whether a patch of these settings may be cut to the adapter's rank; the release's swap has that rank."""
    return config.update != "swap"
