"""What decides about a repair is measured on rows that it has not seen, or it is said that it was not."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from peft import PeftModel
from tiny import drift, quick, refuses_attacks, rows, word_tokenizer

from peft_nlsr import EvaluationSettings, NLSRCallback, PromptSet, evaluate, gate, realign, tune
from peft_nlsr.cli.comparing import tune as tune_command
from peft_nlsr.cli.repair import realign as realign_command
from peft_nlsr.evaluation import Measurement
from peft_nlsr.gate import Measure, Outcome, measured
from peft_nlsr.realign import plan
from peft_nlsr.report import say_interval, say_n, say_value

MakeLora = Callable[..., PeftModel]
TOKENIZER = word_tokenizer()
CALIBRATION = rows(4, poisoned=range(4))
POISONED = (1, 5, 30)
SAFETY = PromptSet("s", "safety", ("s0", "s1"), ("attack word20", "attack word21"))
MEASURE = Measure(
    EvaluationSettings((SAFETY,), judge=refuses_attacks, max_new_tokens=2), TOKENIZER, tolerance=1.0, progress=False
)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Which rows the two-teacher fit took, and which answer accuracy was measured on."""
    found: dict[str, set[int]] = {"fitted": set(), "checked": set()}
    solve, accuracy = realign.solve_two_teacher, gate.answer_accuracy

    def solving(adapter: Any, *, utility: Sequence[Any], **others: Any) -> Any:
        found["fitted"] |= {e.index for e in utility}
        return solve(adapter, utility=utility, **others)

    def checking(model: Any, examples: Sequence[Any], **others: Any) -> Measurement:
        found["checked"] |= {e.index for e in examples}
        return accuracy(model, examples, **others)

    monkeypatch.setattr(realign, "solve_two_teacher", solving)
    monkeypatch.setattr(gate, "answer_accuracy", checking)
    return found


def repaired(model: Any, count: int, **changes: Any) -> Outcome:
    data = rows(count, poisoned=POISONED)
    config = quick(**changes)
    planned = plan(
        model,
        config,
        calibration=CALIBRATION,
        utility=data if config.method == "nlsr" else None,
        tokenizer=TOKENIZER,
        judge=refuses_attacks,
        progress=False,
    )
    return measured(model, planned, MEASURE, data)


@pytest.mark.parametrize("screening", [True, False], ids=["screened", "unscreened"])
def test_rows_of_the_fit_are_not_those_that_are_measured_on(
    make_pico_lora: MakeLora, read: dict[str, set[int]], screening: bool
) -> None:
    outcome = repaired(drift(make_pico_lora()), 80, max_samples=26, screening=screening)
    assert len(read["fitted"]) == 26 and len(read["checked"]) >= 20
    assert not read["fitted"] & read["checked"]
    assert not (screening and set(POISONED) & (read["checked"] | read["fitted"]))
    assert {e.settings["answer_rows"] for e in outcome.evaluations} == {"rows that the repair did not use"}
    assert outcome.realignment is not None and not any("answer accuracy" in n for n in outcome.realignment.notes)


def test_where_too_few_rows_are_left_it_is_said_that_the_rows_were_seen(
    make_pico_lora: MakeLora, read: dict[str, set[int]]
) -> None:
    outcome = repaired(drift(make_pico_lora()), 31, max_samples=16)
    assert read["fitted"] <= read["checked"] and not set(POISONED) & read["checked"]
    assert {e.settings["answer_rows"] for e in outcome.evaluations} == {"rows of the repair"}
    assert outcome.realignment is not None and outcome.report is not None
    (note,) = [note for note in outcome.realignment.notes if "answer accuracy" in note]
    assert "measured on the rows of the repair" in note and note in outcome.report.record["notes"]


def test_a_repair_without_data_is_measured_on_rows_that_the_base_does_not_refuse(
    make_pico_lora: MakeLora, read: dict[str, set[int]]
) -> None:
    outcome = repaired(drift(make_pico_lora()), 12, method="antidote", score="wanda")
    assert read["checked"] == set(range(12)) - set(POISONED)
    assert {e.settings["answer_rows"] for e in outcome.evaluations} == {"rows that the repair did not use"}


def test_the_verdict_says_what_the_paired_test_says(make_pico_lora: MakeLora) -> None:
    assert "p = 1" in repaired(drift(make_pico_lora()), 12).verdict.effect


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_interval_of_shares_does_not_collapse_and_is_said_in_percent(share: float) -> None:
    found = Measurement.of_shares([share] * 94)
    verdicts = Measurement.of_verdicts([bool(share)] * 94)
    assert (found.value, found.low, found.high) == (verdicts.value, verdicts.low, verdicts.high)
    assert found.high - found.low > 0.03
    assert say_value(found) == f"{100 * share:.1f}%" and say_interval(found).endswith("%") and say_n(found) == "n = 94"


def test_every_door_of_the_gate_has_the_same_defaults() -> None:
    def default(called: Any, name: str) -> Any:
        return inspect.signature(called).parameters[name].default

    doors = (NLSRCallback, tune, gate.judge_repair, Measure, realign_command, tune_command)
    assert {default(door, "tolerance") for door in doors} == {0.02}
    asking = (NLSRCallback, EvaluationSettings, evaluate, realign_command, tune_command)
    assert {default(door, "max_new_tokens") for door in asking} == {128}
