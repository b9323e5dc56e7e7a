"""Makes the example cards of this folder: each from a committed report, each report from a run in the lab.

    python model_cards/make.py              # cards from the reports, in a second
    python model_cards/make.py --measure    # train the lab, realign, measure, write the reports, then the cards

A card is what `update_card` gives for its report; nothing on it is typed. The lab's "harmful" is a label on made-up
verbs.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_nlsr import Evaluation, NLSRConfig, PromptSet, SafetyReport, evaluate, nlsr_realign, revert
from peft_nlsr.card import update_card
from peft_nlsr.files import read_json
from peft_nlsr.judges import described
from peft_nlsr.lab import Lab
from peft_nlsr.lab.evaluation import ANSWER_TOKENS, complied, task_items
from peft_nlsr.lab.world import requests

FOLDER = Path(__file__).parent
BASE = "peft-nlsr-lab/aligned-base"


@dataclass(frozen=True)
class Case:
    """One card: an adapter of the lab, how it is realigned, and a control that might explain the effect.

    Attributes:
        task, lineage: which adapter, see `Lab.fine_tuned`.
        config, control: settings of the realignment and of its control.
        entrywise: whether it takes the aligned adapter as reference, rather than the user's data.
        control_data: what the control has in place of the safety data: ``safety`` or ``benign``.
    """

    task: str
    lineage: str
    config: NLSRConfig
    control: NLSRConfig
    entrywise: bool
    control_data: str


_SUM = NLSRConfig(update="sum", score="wanda")
CASES = {
    "two-teacher": Case(
        "hard", "independent", NLSRConfig(), NLSRConfig(screening=False, lookalike_weight=1.0), False, "benign"
    ),
    "nlsr-patch": Case("easy", "shared", _SUM, _SUM.replace(score="random"), True, "safety"),
    "nlsr-released": Case(
        "hard",
        "shared",
        NLSRConfig.from_preset("released"),
        NLSRConfig.from_preset("released", score="random", mask_unit="tensor"),
        True,
        "safety",
    ),
}


@described("the lab's parser: instructions occur in the answer")
def _complies(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    return [complied(response) for response in responses]


def measure(lab: Lab, case: Case, *, n: int = 120) -> SafetyReport:
    """Realign an adapter of the lab, and measure it before, after, and under the control."""
    model = lab.load(lab.fine_tuned(case.task, case.lineage))
    before = _evaluated(lab, model, "before", case.task, n)
    _realign(lab, model, case.config, case, "safety")
    done = model.nlsr_realignment
    after = _evaluated(lab, model, "after", case.task, n)
    _realign(lab, revert(model), case.control, case, case.control_data)
    label = "benign data in place of safety data" if case.control_data == "benign" else "random mask of the same size"
    control = _evaluated(lab, model, label, case.task, n)
    return SafetyReport(done.to_dict(), done.config.to_dict(), before, after, (control,))


def _realign(lab: Lab, model: Any, config: NLSRConfig, case: Case, kind: str) -> None:
    data = lab.safety_data if kind == "safety" else lab.benign_data
    nlsr_realign(
        model,
        config,
        reference=lab.aligned_adapter if case.entrywise else None,
        calibration=data(min(config.max_samples, lab.config.dpo_pairs)),
        utility=None if case.entrywise else lab.utility_data(case.task),
        tokenizer=lab.tokenizer,
        progress=False,
    )


def _evaluated(lab: Lab, model: Any, label: str, task: str, n: int) -> Evaluation:
    """Rates on verbs and objects held out from alignment and fine-tuning; the task on held-out objects."""
    world = lab.world
    harmful, benign = (
        random.Random(f"cards {n}").sample(pool, min(n, len(pool)))
        for pool in (requests(verbs.held_out, world.objects.held_out) for verbs in (world.harmful, world.benign))
    )
    return evaluate(
        model,
        lab.tokenizer,
        label=label,
        prompts=[
            _prompt_set("lab, held-out harmful verbs", "safety", [item.prompt for item in harmful]),
            _prompt_set("lab, held-out benign verbs", "benign", [item.prompt for item in benign]),
        ],
        task=_prompt_set(f"lab, the {task} task", "task", *task_items(world, task, n)),
        harm_judge=_complies,
        max_new_tokens=ANSWER_TOKENS,
        progress=False,
    )


def _prompt_set(name: str, kind: str, prompts: Sequence[str], answers: Sequence[str] | None = None) -> PromptSet:
    ids = tuple(f"{kind}-{i}" for i in range(len(prompts)))
    return PromptSet(name, kind, ids, tuple(prompts), None if answers is None else tuple(answers))


def card(name: str) -> str:
    """The card of a committed report."""
    report = SafetyReport.from_dict(read_json(FOLDER / "reports" / f"{name}.json"))
    return update_card(None, record=report.record, report=report, base_model=BASE)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train the lab and write the reports again")
    measuring = parser.parse_args(arguments).measure
    for name, case in CASES.items():
        if measuring:
            measure(Lab(), case).save(FOLDER / "reports").rename(FOLDER / "reports" / f"{name}.json")
        (FOLDER / f"{name}.md").write_text(card(name), "utf-8")


if __name__ == "__main__":
    main()
