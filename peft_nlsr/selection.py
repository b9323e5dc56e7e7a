"""From the similarity of each module to the decision which modules are restored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .config import NLSRConfig


@dataclass(frozen=True)
class Decision:
    """What was decided about one module, and from what.

    Attributes:
        module: its name.
        similarity: cosine of the safety-critical parts of reference and adapter, -1 to 1; low means drifted away; None
            where the method compares nothing.
        restored: whether the module is restored.
        probability: chance it had of being restored, for the random selections; None for the others.
    """

    module: str
    similarity: float | None
    restored: bool
    probability: float | None = None


def block_of(module: str) -> str:
    """The block a module lies in: its name up to the first number, or the whole name when it has none.

    >>> block_of("model.layers.3.mlp.up_proj")
    'model.layers.3'
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", module)
    return found[0] if found else module


def select(similarities: Mapping[str, float], config: NLSRConfig) -> list[Decision]:
    """Decide for every module; the order of the result is the order of ``similarities``.

    Selections (NLSR, arXiv 2412.12497, eq. 7-10):
        least_similar: the ``round(restore_rate * n)`` least similar; deterministic, ties go to the earlier module.
        bernoulli: each is left alone with probability ``P_L + delta * rank / n``, rank 1 for the least similar.
        bernoulli_released: as released, where the *most* similar are restored most often.
        threshold: those with similarity below ``similarity_threshold``.
        all: every module.

    With ``selection_unit="block"`` the modules of a block share their mean similarity and one decision.
    """
    units: dict[str, list[str]] = {}
    for module in similarities:
        units.setdefault(block_of(module) if config.selection_unit == "block" else module, []).append(module)
    if not units:
        raise ValueError("there is no module to select from")
    means = torch.tensor([sum(similarities[m] for m in ms) / len(ms) for ms in units.values()], dtype=torch.float64)
    restored, chances = _SELECTIONS[config.selection](means, config)
    of_module = {
        module: Decision(
            module, similarities[module], bool(restored[i]), None if chances is None else float(chances[i])
        )
        for i, modules in enumerate(units.values())
        for module in modules
    }
    return [of_module[module] for module in similarities]


_Outcome = tuple[torch.Tensor, "torch.Tensor | None"]


def _rank(values: torch.Tensor) -> torch.Tensor:
    """0 for the smallest; ties keep their order."""
    return values.argsort(stable=True).argsort()


def _least_similar(similarity: torch.Tensor, config: NLSRConfig) -> _Outcome:
    return _rank(similarity) < round(config.restore_rate * len(similarity)), None


def _bernoulli(similarity: torch.Tensor, config: NLSRConfig) -> _Outcome:
    ranks = _rank(similarity).double() + 1
    left_alone = (config.prune_probability + config.prune_increment * ranks / len(ranks)).clamp(0.0, 1.0)
    return _draw(left_alone, config) == 0, 1.0 - left_alone


def _bernoulli_released(similarity: torch.Tensor, config: NLSRConfig) -> _Outcome:
    """The release restores where its draw is 1, with a probability that rises with similarity."""
    spread = max(len(similarity) - 1, 1)
    low = config.prune_probability - config.prune_increment
    chance = (low + _rank(similarity).double() / spread * 2 * config.prune_increment).clamp(0.0, 1.0)
    return _draw(chance, config) == 1, chance


def _threshold(similarity: torch.Tensor, config: NLSRConfig) -> _Outcome:
    return similarity < config.similarity_threshold, None


def _all(similarity: torch.Tensor, config: NLSRConfig) -> _Outcome:
    return torch.ones(len(similarity), dtype=torch.bool), None


def _draw(probabilities: torch.Tensor, config: NLSRConfig) -> torch.Tensor:
    return torch.bernoulli(probabilities, generator=torch.Generator().manual_seed(config.nlsr_seed))


_SELECTIONS = {
    "least_similar": _least_similar,
    "bernoulli": _bernoulli,
    "bernoulli_released": _bernoulli_released,
    "threshold": _threshold,
    "all": _all,
}
