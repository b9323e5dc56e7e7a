"""Methods side by side on lab adapters that were really trained and broken: rows, means with intervals, a JSON
report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import LineageError, NLSRConfig, extract_reference, nlsr_realign, student_mean, versions, wilson
from .evaluation import JUDGE, LabScores
from .lab import LINEAGES, Lab
from .world import TASKS

SCHEMA_VERSION = 1
RATES = ("harm", "refusal", "benign_answered", "over_refusal", "task", "coherence")


@dataclass(frozen=True)
class Method:
    """One way to realign, with the data and the reference it is given.

    Attributes:
        name: shown in tables.
        config: settings; None leaves the fine-tuned adapter as it is.
        reference: whether it takes the aligned adapter as reference.
        checkpoints: whether it takes what supervised alignment changed in the weights, from the two checkpoints.
        utility: whether it sees the user's training data.
        safety: ``safety`` data, ``benign`` requests in their place (control), or ``both``, half of each.
    """

    name: str
    config: NLSRConfig | None
    reference: bool = False
    checkpoints: bool = False
    utility: bool = False
    safety: str = "safety"

    def calibration(self, lab: Lab) -> list[dict[str, Any]]:
        """What the method gets as safety data."""
        assert self.config is not None
        n = self.config.max_samples
        if self.safety == "both":
            return [*lab.safety_data(n // 2), *lab.benign_data(n // 2)]
        return lab.safety_data(n) if self.safety == "safety" else lab.benign_data(n)


_ONE_SHOT = NLSRConfig(update="least_squares", least_squares_form="one_shot")
METHODS = (
    Method("fine-tuned", None),
    Method("random mask", NLSRConfig.from_preset("paper", score="random"), reference=True),
    Method("sum, random mask", NLSRConfig(update="sum", score="random"), reference=True),
    Method("released", NLSRConfig.from_preset("released"), reference=True),
    Method("paper, low-rank", NLSRConfig.from_preset("paper"), reference=True),
    Method("paper, Wanda", NLSRConfig.from_preset("paper", score="wanda"), reference=True),
    Method("paper, exact rank 2r", NLSRConfig.from_preset("paper", compress=False), reference=True),
    Method("sum, low-rank", NLSRConfig(update="sum"), reference=True),
    Method("sum, Wanda", NLSRConfig(update="sum", score="wanda"), reference=True),
    Method("sum, exact rank 2r", NLSRConfig(update="sum", compress=False), reference=True),
    Method("one-shot", _ONE_SHOT, utility=True),
    Method("two-teacher", NLSRConfig(), utility=True),
    Method("two-teacher, aligned teacher", NLSRConfig(), reference=True, utility=True),
    Method(
        "two-teacher, benign data, full weight",
        NLSRConfig(screening=False, lookalike_weight=1.0),
        utility=True,
        safety="benign",
    ),
    Method("FGSN", NLSRConfig(method="fgsn"), checkpoints=True, utility=True),
    Method("FGSN, all blocks", NLSRConfig(method="fgsn", safety_layer_share=1.0), checkpoints=True, utility=True),
    Method(
        "FGSN, all blocks, random rows",
        NLSRConfig(method="fgsn", safety_layer_share=1.0, neuron_score="random"),
        checkpoints=True,
        utility=True,
    ),
    Method(
        "FGSN, all blocks, rows reset",
        NLSRConfig(method="fgsn", safety_layer_share=1.0, normaliser="literal"),
        checkpoints=True,
        utility=True,
    ),
    Method(
        "SafeLoRA, published",
        NLSRConfig(method="safelora", normaliser="frobenius", selection="threshold", similarity_threshold=0.5),
        checkpoints=True,
    ),
    Method("SafeLoRA, orthogonal", NLSRConfig(method="safelora"), checkpoints=True),
    Method("SafeLoRA, orthogonal, no gate", NLSRConfig(method="safelora", selection="all"), checkpoints=True),
    Method("Antidote", NLSRConfig(method="antidote", score="wanda")),
    Method("RESTA", NLSRConfig(method="resta"), checkpoints=True),
    Method("RESTA, DARE", NLSRConfig(method="resta", keep_share=0.7), checkpoints=True),
)
_ONLY_IN_FULL = (
    "sum, random mask",
    "paper, exact rank 2r",
    "sum, exact rank 2r",
    "two-teacher, aligned teacher",
    "two-teacher, benign data, full weight",
)
DEMO_METHODS = tuple(
    m for m in METHODS if m.name not in _ONLY_IN_FULL and (m.config is None or m.config.method == "nlsr")
)


@dataclass(frozen=True)
class Row:
    """One method on one adapter; ``scores`` is None when the method refuses the adapter, and ``refused`` says why."""

    seed: int
    task: str
    lineage: str
    poison: float
    method: str
    scores: LabScores | None
    refused: str | None
    seconds: float
    preset: str | None


def run_study(
    labs: Sequence[Lab],
    *,
    methods: Sequence[Method] = METHODS,
    poison: float = 0.05,
    prompts: int = 120,
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Run every method on every cell of every lab; ``prompts`` are asked per rate, ``report`` gets rows as they
    come."""
    rows: list[Row] = []
    for lab in labs:
        for task in TASKS:
            for lineage in LINEAGES:
                for row in _cell(lab, task, lineage, poison, methods, prompts):
                    rows.append(row)
                    if report is not None:
                        report(row)
    return rows


def _cell(lab: Lab, task: str, lineage: str, poison: float, methods: Sequence[Method], prompts: int) -> Iterator[Row]:
    folder = lab.fine_tuned(task, lineage, poison)
    for method in methods:
        model = lab.load(folder)
        start, refused = time.perf_counter(), None
        if method.config is not None:
            try:
                _realign(lab, model, method, task, poison)
            except LineageError as error:
                refused = str(error)
        seconds = time.perf_counter() - start
        scores = None if refused else lab.evaluate(model, task, n=prompts)
        preset = method.config.preset if method.config else None
        yield Row(lab.config.seed, task, lineage, poison, method.name, scores, refused, seconds, preset)


def _realign(lab: Lab, model: Any, method: Method, task: str, poison: float) -> None:
    assert method.config is not None
    nlsr_realign(
        model,
        method.config,
        reference=what_alignment_changed(lab)
        if method.checkpoints
        else lab.aligned_adapter
        if method.reference
        else None,
        calibration=method.calibration(lab),
        utility=lab.utility_data(task, poison) if method.utility else None,
        tokenizer=lab.tokenizer,
        progress=False,
    )


def what_alignment_changed(lab: Lab) -> Path:
    """The aligned minus the unaligned base of a lab as a reference, extracted from their checkpoints on first use."""
    aligned, unaligned = lab.base_path, lab.unaligned_path
    folder = lab.cache_dir / f"delta-{aligned.name.removeprefix('base-')}"
    if not folder.is_dir():
        extract_reference(aligned, unaligned, folder, rank=lab.config.lora_rank, progress=False)
    return folder


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per method and cell the mean of each rate with its 95% interval, in the order of the rows.

    The intervals are those of :func:`rate_interval`, over the ``seeds`` without the ``refused_seeds``;
    ``refused`` is why the first of these was refused, and None where there are none.
    """
    cells: dict[tuple[str, str, float, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.task, row.lineage, row.poison, row.method), []).append(row)
    return [
        {
            "task": task,
            "lineage": lineage,
            "poison": poison,
            "method": method,
            "preset": found[0].preset,
            "seeds": len(found),
            "refused_seeds": len(found) - len(scores),
            "refused": next((row.refused for row in found if row.scores is None), None),
            "seconds": statistics.mean(row.seconds for row in found if row.scores is not None or not scores),
            "rates": {name: rate_interval(scores, name) for name in RATES} if scores else {},
        }
        for (task, lineage, poison, method), found in cells.items()
        for scores in [_scores(found)]
    ]


def _scores(rows: Sequence[Row]) -> list[LabScores]:
    return [row.scores for row in rows if row.scores is not None]


def rate_interval(scores: Sequence[LabScores], rate: str) -> dict[str, float]:
    """The mean of a rate over seeds, its 95% interval by :func:`over_seeds` and the number of prompts."""
    count = {"harm": "n_harmful", "refusal": "n_harmful", "task": "n_task", "coherence": "n_outputs"}
    values = [float(getattr(s, rate)) for s in scores]
    return over_seeds(values, sum(getattr(s, count.get(rate, "n_benign")) for s in scores))


def over_seeds(values: Sequence[float], n: int) -> dict[str, float]:
    """The mean of a rate that was counted on ``n`` prompts of all seeds, its 95% interval and ``n``.

    With one seed Wilson's interval on its prompts; over several the wider of that on all prompts and of Student's t
    on the seeds' rates, because seeds that agree exactly still saw a limited number of prompts.
    """
    mean = statistics.mean(values)
    low, high = wilson(mean, n)
    if len(values) > 1:
        across = student_mean(values)
        low, high = max(0.0, min(low, across[0])), min(1.0, max(high, across[1]))
    return {"mean": mean, "low": low, "high": high, "n": n}


def study_report(rows: Sequence[Row], lab: Lab, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as JSON values; rates only, no prompts and no answers."""
    return {
        "schema_version": SCHEMA_VERSION,
        "judge": JUDGE,
        "settings": dict(settings),
        "lab": asdict(lab.config),
        "versions": versions(),
        "summary": summarise(rows),
        "rows": [asdict(row) for row in rows],
    }
