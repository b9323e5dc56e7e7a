"""Every setting of a realignment, in one flat, frozen, JSON-typed dataclass, and the presets.

The help text of a field exists once, in its metadata; the command line and the documentation read it from there.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CorruptFileError, PeftNLSRError
from .files import read_json, require_schema, write_json
from .hub import fetch, push_folder, staging

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

CONFIG_NAME = "nlsr_config.json"
SCHEMA_VERSION = 1

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "update": "sum",
        "extrapolation": "exact",
        "mask_unit": "tensor",
        "selection": "bernoulli",
        "calibration_tokens": "response",
        "calibration_model": "reference",
        "prune_increment": 0.1,
    },
    "released": {
        "update": "swap",
        "extrapolation": "released",
        "low_rank_rule": "released",
        "mask_unit": "tensor",
        "selection": "bernoulli_released",
        "calibration_tokens": "response",
        "calibration_model": "reference",
        "sequential": True,
        "prune_increment": 0.2,
        "nlsr_seed": 42,
    },
}
# The release thresholds these within rows, its own low_rank score over the tensor; it has no magnitude score.
_RELEASED_ROWS = ("wanda", "snip", "preference_snip", "random")

CHOICES: dict[str, tuple[str, ...]] = {
    "preset": tuple(PRESETS),
    "method": ("nlsr", "fgsn", "safelora", "antidote", "resta"),
    "update": ("auto", "sum", "swap", "least_squares"),
    "least_squares_form": ("two_teacher", "one_shot"),
    "score": ("low_rank", "wanda", "snip", "preference_snip", "magnitude", "random"),
    "extrapolation": ("exact", "released"),
    "low_rank_rule": ("paper", "released"),
    "mask_unit": ("tensor", "row"),
    "calibration_tokens": ("all", "response"),
    "calibration_model": ("tuned", "reference"),
    "selection": ("least_similar", "bernoulli", "bernoulli_released", "threshold", "all"),
    "selection_unit": ("module", "block"),
    "normaliser": ("orthogonal", "spectral", "frobenius", "literal"),
    "neuron_score": ("wanda", "contrast", "update", "random"),
    "solver": ("auto", "full", "moment", "dual", "iterative"),
    "offload": ("auto", "always", "never"),
    "refused_prompts": ("join", "drop"),
}
_LAYERS = re.compile(r"auto|\d+(-\d+)?(,\d+(-\d+)?)*")


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class NLSRConfig:
    """Settings of a realignment. Build with ``NLSRConfig()`` or, for a preset, ``NLSRConfig.from_preset("paper")``.

    Raises:
        ValueError: a value outside its choices or range; the text lists what is valid.
    """

    preset: str = _knob("default", "Name of the preset these settings started from; travels with every number.")
    method: str = _knob(
        "nlsr",
        "What repairs the adapter: nlsr (in the form that `update` names), fgsn, safelora, or the baselines antidote "
        "and resta.",
    )
    update: str = _knob(
        "auto",
        "How a module is restored: sum (NLSR eq. 12), swap (as released), least_squares, or auto (decided by what is "
        "available).",
    )
    least_squares_form: str = _knob("two_teacher", "Which least_squares: two_teacher (needs data) or one_shot.")
    # NLSR, arXiv 2412.12497
    beta: float = _knob(
        0.9, "Pre-amplification: dW_e = (1 + beta) dW_a - beta dW_0 (eq. 2). Larger is safer and ruder."
    )
    extrapolation: str = _knob("exact", "exact on dW, or released (A and B both multiplied by 2 beta).")
    score: str = _knob(
        "low_rank",
        "Which entries of the reference are safety-critical; preference_snip takes statistics of batches of pairs, "
        "chosen and rejected (collect_statistics), which only build_nlsr_patch makes a patch of.",
    )
    sparsity: float = _knob(0.8, "P_SR: share of entries left out of the safety region; 0.8 keeps the top 20%.")
    low_rank_rule: str = _knob(
        "paper", "low_rank keeps r - int(r P_SR) directions (paper) or int(r P_SR) with a strict threshold (released)."
    )
    mask_unit: str = _knob(
        "tensor",
        "Entries compete within the whole tensor or within their row; preset released takes rows with the scores "
        "wanda, snip, preference_snip and random, as the release does.",
    )
    calibration_tokens: str = _knob("all", "Tokens that enter the statistics: all, or the response (labels) only.")
    calibration_model: str = _knob("tuned", "Model whose activations are used: the fine-tuned one or the reference.")
    sequential: bool = _knob(False, "Calibrate each block on a model whose earlier blocks are already reduced.")
    selection: str = _knob("least_similar", "Which modules are restored.")
    selection_unit: str = _knob("module", "Select single modules or whole blocks.")
    restore_rate: float = _knob(0.5, "Share of modules restored by least_similar.")
    prune_probability: float = _knob(0.5, "P_L of eq. 9: base probability that bernoulli leaves a module alone.")
    prune_increment: float = _knob(0.4, "delta of eq. 9: what the similarity rank adds to it; not given there.")
    similarity_threshold: float = _knob(0.6, "selection=threshold restores modules whose similarity is below this.")
    compress: bool = _knob(
        True,
        "Cut the sum back to the adapter's rank, by what matters for the patch's calibration inputs; False keeps the "
        "exact rank 2r.",
    )
    # the two-teacher and one-shot closed forms
    utility_weight: float = _knob(1.0, "lambda: weight of the user's data against the safety data.")
    lookalike_weight: float = _knob(
        0.01,
        "two_teacher's weight, beside 1 for a refusal, of safety data that are answered, also by the safe teacher: "
        "where such lookalikes contradict the user's data, the user's data decide.",
    )
    ridge: float = _knob(3e-2, "eps: pull towards the fine-tuned update, relative to the mean input power.")
    decision_weight: float = _knob(
        3.0, "two_teacher's weight of the last prompt token, where an answer is begun, beside 1 for every other token."
    )
    correct_drift: bool = _knob(
        True,
        "two_teacher asks the last module of each block, where the safe answer is a refusal, for the output that "
        "makes the hidden state the safe teacher's, so that what the modules before it left undone is made good.",
    )
    solver: str = _knob(
        "auto",
        "How two_teacher solves a group of modules: full (float64 second moments), moment (those of the inputs only), "
        "dual (products of tokens), iterative (conjugate gradients); auto is full up to 2048 inputs and the cheapest "
        "of the others above.",
    )
    max_tokens: int = _knob(
        65536, "Tokens that moment, dual and iterative keep per group; more are drawn by weight to this number."
    )
    offload: str = _knob(
        "auto",
        "Keep two_teacher's hidden states on the CPU between blocks: always, never, or where they would take half of "
        "the accelerator's free memory (auto).",
    )
    screening: bool = _knob(
        True, "Ask the safe teacher first; user prompts that it refuses are not among what is to be kept."
    )
    refused_prompts: str = _knob(
        "join",
        "What becomes of them: join the safety data with the teacher's answer, or drop, for a user's task in which "
        "prompts that the teacher refuses are legitimate.",
    )
    leave_intact: bool = _knob(
        True, "Change nothing where the adapter still refuses (99 % of) what the safe teacher refuses."
    )
    answer_tokens: int = _knob(16, "Greedy tokens generated when a teacher answers a prompt.")
    # projection onto what alignment changed: FGSN, arXiv 2508.09190, and SafeLoRA, arXiv 2405.16833
    normaliser: str = _knob(
        "orthogonal",
        "How D, what alignment changed, becomes a projection: orthogonal U U^T of its top directions, D D^T over "
        "|D|_2^2 (spectral), over |D|_F (frobenius, SafeLoRA's), or over its number of entries (literal: a reset to "
        "zero).",
    )
    subspace_share: float = _knob(0.9, "orthogonal keeps the directions with this share of D's singular values.")
    kappa: float = _knob(1.0, "Strength of a projection: B becomes (1 - kappa) B + kappa P B.")
    safety_layers: str = _knob(
        "auto", "Blocks that FGSN edits, counted from 0: auto (by the cosine gap), or like 10-15 or 3,5,7-9."
    )
    safety_layer_share: float = _knob(0.2, "Share of the blocks in the window that auto looks for.")
    harmful_rows: float = _knob(0.35, "q: share of a module's rows that count as important on harmful prompts.")
    utility_rows: float = _knob(0.1, "p: share of a module's rows spared as the most important on utility data.")
    neuron_score: str = _knob(
        "wanda",
        "Rows by importance on harmful prompts, by its ratio to that on utility data (contrast, ours), by the ratio "
        "of how much the update moves that output (update, ours), or as many random ones as wanda finds (control).",
    )
    safety_dimension: str = _knob("safety", "Name of the safety dimension that an FGSN run adds to the adapter.")
    # the small baselines
    safety_weight: float = _knob(1.0, "resta: weight of what alignment changed when it is added to the adapter.")
    keep_share: float = _knob(1.0, "resta: DARE keeps this share of B's entries at random and rescales them.")
    max_samples: int = _knob(320, "Examples used of each kind of data.")
    max_length: int = _knob(512, "Tokens per example; longer ones are cut on the right.")
    nlsr_batch_size: int = _knob(16, "Examples per forward pass; of examples below 64 tokens, as many as fill it.")
    nlsr_seed: int = _knob(0, "Seed of every random draw.")

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(valid)}")
        for name in ("restore_rate", "prune_probability", "prune_increment"):
            _check(self, name, 0.0, 1.0)
        for name in ("kappa", "subspace_share", "safety_layer_share", "harmful_rows", "utility_rows"):
            _check(self, name, 0.0, 1.0)
        _check(self, "keep_share", 1e-3, 1.0)
        _check(self, "sparsity", 0.0, 1.0, open_above=True)
        _check(self, "similarity_threshold", -1.0, 1.0)
        for name in ("beta", "utility_weight", "decision_weight", "safety_weight"):
            _check(self, name, 0.0, math.inf, open_above=True)
        _check(self, "ridge", 1e-12, 1e3)
        _check(self, "lookalike_weight", 1e-6, 1e3)
        for name in ("max_samples", "max_tokens", "nlsr_batch_size", "answer_tokens"):
            _check(self, name, 1, 2**31, whole=True)
        _check(self, "max_length", 2, 2**31, whole=True)
        _check(self, "nlsr_seed", 0, 2**63 - 1, whole=True)
        for name in ("sequential", "compress", "correct_drift", "screening", "leave_intact"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")

        if not isinstance(self.safety_layers, str) or not _LAYERS.fullmatch(self.safety_layers):
            raise ValueError(f"safety_layers={self.safety_layers!r} must be auto or like 10-15 or 3,5,7-9")
        if not isinstance(self.safety_dimension, str) or not self.safety_dimension.strip():
            raise ValueError(f"safety_dimension={self.safety_dimension!r} must be a name")

    @classmethod
    def from_preset(cls, preset: str, /, **changes: Any) -> NLSRConfig:
        """The settings of a preset (``default``, ``paper``, ``released``), with single fields changed.

        ``released`` with a score whose entries compete within rows there has ``mask_unit="row"``, unless that is
        given; :meth:`replace` changes only what it is told.

        Example:
            >>> NLSRConfig.from_preset("paper", sparsity=0.7).selection
            'bernoulli'
        """
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
        return cls(**{"preset": preset, **PRESETS[preset], **_of_score(preset, changes.get("score")), **changes})

    def replace(self, **changes: Any) -> NLSRConfig:
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)

    def changed_settings(self) -> dict[str, Any]:
        """The settings that differ from those of the preset that these started from, given its ``score``."""
        preset = {**dataclasses.asdict(NLSRConfig.from_preset(self.preset)), **_of_score(self.preset, self.score)}
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if value != preset[name]}

    @property
    def preset_label(self) -> str:
        """The preset, and how many settings were changed since; ``update`` where the preset left it open is none.

        Example:
            >>> NLSRConfig.from_preset("paper", sparsity=0.7).preset_label
            'paper, 1 setting changed'
        """
        resolved = {"update"} if PRESETS[self.preset].get("update", "auto") == "auto" else set()
        count = len(self.changed_settings().keys() - resolved)
        return f"{self.preset}, {count} setting{'s' if count > 1 else ''} changed" if count else self.preset

    def to_dict(self) -> dict[str, Any]:
        """All fields and the schema version, as JSON types."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NLSRConfig:
        """The inverse of :meth:`to_dict`. Unknown keys warn by name.

        Raises:
            CorruptFileError: the values have another schema version, such as a newer one.
            ValueError: a value outside its choices or range.
        """
        require_schema(values, SCHEMA_VERSION, "these settings")
        values = {name: value for name, value in values.items() if name != "schema_version"}
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            warnings.warn(
                f"NLSRConfig ignores unknown keys {', '.join(unknown)} (schema {SCHEMA_VERSION}); upgrade peft_nlsr "
                "if you rely on them",
                stacklevel=2,
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write ``nlsr_config.json`` into a folder (made when missing).

        Raises:
            PeftNLSRError: the folder holds the record of a realignment that was made with other settings.
        """
        path = Path(save_directory) / CONFIG_NAME
        content = read_json(path) if path.exists() else {}
        _require_same_settings(self, content, str(path))
        content["config"] = self.to_dict()
        write_json(path, content)
        return path

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> NLSRConfig:
        """Read ``nlsr_config.json`` from a folder or, when no such folder exists, from a Hub repository.

        Raises:
            PeftNLSRError: there is no such file; CorruptFileError: it holds no settings that this version reads.
            ValueError: a value outside its choices or range.
        """
        path = Path(source) / CONFIG_NAME if Path(source).is_dir() else _downloaded(str(source), revision)
        if not path.is_file():
            raise PeftNLSRError(f"{source} has no {CONFIG_NAME}; give a folder to which settings were saved")
        content = read_json(path)
        if not isinstance(content.get("config"), dict):
            raise CorruptFileError(f"{path} holds no 'config' object, found the keys {', '.join(content) or '(none)'}")
        try:
            return cls.from_dict(content["config"])
        except CorruptFileError as error:
            raise CorruptFileError(f"{path}: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> CommitInfo:
        """Push ``nlsr_config.json``; the arguments are those of :func:`peft_nlsr.hub.push_folder`.

        Raises:
            PeftNLSRError: the repository holds the record of a realignment that was made with other settings.
            PushError: the Hub could not be reached, or refused.
        """
        present = fetch(repo_id, CONFIG_NAME, revision=revision, token=token)
        with staging() as folder:
            if present is not None:
                _require_same_settings(self, read_json(present), repo_id)
                shutil.copyfile(present, folder / CONFIG_NAME)
            self.save_pretrained(folder)
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload NLSR settings",
                token=token,
            )


def _of_score(preset: str, score: Any) -> dict[str, Any]:
    """What a preset sets otherwise with this score."""
    return {"mask_unit": "row"} if preset == "released" and score in _RELEASED_ROWS else {}


def _downloaded(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise PeftNLSRError(f"no settings at {repo_id!r}: no such folder, and from the Hub: {error}") from error


def _require_same_settings(config: NLSRConfig, present: dict[str, Any], where: str) -> None:
    if present.get("record") is not None and present.get("config") != config.to_dict():
        raise PeftNLSRError(
            f"{where} holds the record of a realignment that was made with other settings, which these would "
            "contradict; put them into a place of their own"
        )


def _check(
    config: NLSRConfig, name: str, low: float, high: float, *, whole: bool = False, open_above: bool = False
) -> None:
    value = getattr(config, name)
    kind = int if whole else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be {'a whole number' if whole else 'a number'}")
    if not (low <= value < high if open_above else low <= value <= high):
        raise ValueError(f"{name}={value!r} must be in [{low}, {high}{')' if open_above else ']'}")
