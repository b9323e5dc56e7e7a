"""Attacks among the user's rows are found by asking the safe teacher, named by row, and never quoted."""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import assert_same_state, drift, factors_of, quick, refuses_attacks, rows, state_of, word_tokenizer

from peft_nlsr import CalibrationError, IncompatibleError, screening
from peft_nlsr.blocks import as_teacher
from peft_nlsr.examples import Example
from peft_nlsr.generation import generate_answers
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.prompts import REFUSALS
from peft_nlsr.reference import BASE_REFERENCE
from peft_nlsr.screening import TeachingData, answer_safety_prompts, prepare_data, safest

MakeLora = Callable[..., PeftModel]
TOKENIZER = word_tokenizer()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(make_pico_lora: MakeLora) -> PeftModel:
    return drift(make_pico_lora(seed=0))


def prepare(model: PeftModel, **changes: Any) -> TeachingData:
    given: dict[str, Any] = {
        "calibration": rows(2, poisoned=[0, 1]),
        "utility": rows(8, poisoned=[2, 5]),
        "tokenizer": TOKENIZER,
        "safe_teacher": None,
        "judge": refuses_attacks,
        "config": quick(),
        "progress": False,
    }
    return prepare_data(LiveAdapter(model), **{**given, **changes})


def answered_by(model: PeftModel, teacher: Any, examples: list[Example]) -> list[tuple[int, ...]]:
    with as_teacher(LiveAdapter(model), teacher):
        return generate_answers(model, TOKENIZER, [e.prompt for e in examples], max_new_tokens=2, batch_size=4)


def by_row(examples: list[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: example.index)


def test_poisoned_rows_leave_the_utility_data_and_join_the_safety_data(model: PeftModel) -> None:
    data = prepare(model)
    assert sorted(e.index for e in data.utility) == [0, 1, 3, 4, 6, 7]
    joined = by_row(data.safety[2:])
    assert [e.index for e in joined] == [2, 5]
    assert all("attack" in TOKENIZER.decode(e.prompt) for e in joined)
    assert data.record["utility"] == {
        "source": "given",
        "used": 6,
        "screened": 8,
        "unscreened_for_lack_of_a_prompt": 0,
        "unscreened_for_lack_of_room": 0,
        "refused_by_teacher": 2,
        "refused_rows": [2, 5],
    }
    (note,) = data.notes
    assert note.startswith("2 of 8 of your prompts are refused by the safe teacher")


def test_refused_rows_may_be_dropped(model: PeftModel) -> None:
    joined, dropped = (prepare(model, config=quick(refused_prompts=what)) for what in ("join", "drop"))
    assert dropped.safety == joined.safety[:2] and dropped.utility == joined.utility
    assert dropped.record == joined.record
    (note,) = dropped.notes
    assert "they were left out (row indices" in note and "used as safety data" in joined.notes[0]


@pytest.mark.parametrize("teacher", ["base", "adapter"])
def test_a_refused_row_gets_the_answer_of_the_teacher_and_a_kept_row_keeps_its_own(
    model: PeftModel, make_pico_lora: MakeLora, teacher: str
) -> None:
    factors = None if teacher == "base" else factors_of(make_pico_lora(seed=3))
    data = prepare(model, safe_teacher=factors)
    joined = data.safety[2:]
    assert [e.answer for e in joined] == answered_by(model, factors, joined)
    for example in data.utility:
        assert TOKENIZER.decode(example.answer) == f"sure word{7 * example.index % 40} </s>"


def test_rows_are_named_as_the_caller_counts_them_also_when_sampled(model: PeftModel) -> None:
    poisoned = range(0, 60, 3)
    data = prepare(model, utility=rows(60, poisoned=poisoned), config=quick(max_samples=10))
    refused = data.record["utility"]["refused_rows"]
    assert data.record["utility"]["screened"] == 20
    assert refused == sorted(set(refused)) and set(refused) <= set(poisoned) and refused
    assert not {e.index for e in data.utility} & set(poisoned)
    assert len(data.utility) == data.record["utility"]["used"] <= 10


def test_a_batch_with_several_attacks_is_named_once(model: PeftModel) -> None:
    def batch(word: str) -> dict[str, Any]:
        return {"input_ids": [TOKENIZER(f"{word} the <bot> sure")["input_ids"]] * 3, "labels": [[-100] * 3 + [11]] * 3}

    data = prepare(model, utility=[batch("paint"), batch("attack"), batch("paint")], config=quick(max_samples=20))
    assert data.record["utility"]["refused_rows"] == [1] and data.record["utility"]["refused_by_teacher"] == 3
    assert sorted(e.index for e in data.utility) == [0] * 3 + [2] * 3


def test_a_benign_set_loses_nothing_and_nothing_is_said(model: PeftModel) -> None:
    data = prepare(model, utility=rows(8))
    assert sorted(e.index for e in data.utility) == list(range(8)) and len(data.safety) == 2
    assert data.record["utility"]["refused_rows"] == [] and data.notes == ()


def test_neither_record_nor_notes_hold_texts(model: PeftModel) -> None:
    data = prepare(
        model, calibration=[{"prompt": "attack the lamp"}], utility=[*rows(4, poisoned=[1]), {"text": "a vase"}]
    )
    said = json.dumps(data.record, allow_nan=False) + " ".join(data.notes)
    for word in ("attack", "lamp", "paint", "vase", "word"):
        assert word not in said


def test_rows_without_a_prompt_stay_and_are_counted(model: PeftModel) -> None:
    data = prepare(model, utility=[*rows(3, poisoned=[1]), {"text": "attack the vase"}])
    assert sorted(e.index for e in data.utility) == [0, 2, 3]
    assert data.record["utility"]["unscreened_for_lack_of_a_prompt"] == 1
    assert any("1 utility examples have no prompt" in note and "were not found" in note for note in data.notes)


@pytest.mark.parametrize("screening", [True, False])
def test_utility_rows_without_an_answer_are_counted(model: PeftModel, screening: bool) -> None:
    unanswered = [{"prompt": "paint the lamp", "answer": "in a column of another name"}]
    data = prepare(model, utility=[*rows(3), *unanswered], config=quick(screening=screening))
    assert any("1 of 4 utility examples have no answer" in note for note in data.notes)


def test_prompts_that_were_cut_are_not_taken_for_harmless_ones(model: PeftModel) -> None:
    long = [{"prompt": "paint the lamp " * 9 + "attack", "response": "sure"}]
    data = prepare(model, utility=[*rows(3), *long], config=quick(max_length=16))
    assert data.record["utility"]["screened"] == 3
    assert data.record["utility"]["unscreened_for_lack_of_a_prompt"] == 1


def test_a_set_of_attacks_only_leaves_no_utility_data_and_says_so(model: PeftModel) -> None:
    data = prepare(model, utility=rows(4, poisoned=range(4)))
    assert data.utility == [] and data.record["utility"]["used"] == 0
    assert any("refuses all utility prompts" in note for note in data.notes)


def test_without_screening_every_row_stays(model: PeftModel) -> None:
    data = prepare(model, config=quick(screening=False, max_samples=5))
    assert len(data.utility) == 5 and len(data.safety) == 2
    assert data.record["utility"] == {"source": "given", "used": 5} and data.notes == ()


# ---- safety data


def test_given_answers_are_kept(model: PeftModel) -> None:
    data = prepare(model, calibration=[{"prompt": "attack the lamp", "response": "no never"}], utility=rows(2))
    assert [TOKENIZER.decode(e.answer) for e in data.safety] == ["no never </s>"]
    assert data.record["safety"] == {
        "source": "given",
        "used": 1,
        "asked_of_teacher": 0,
        "refused_by_teacher": 0,
        "lookalikes": 0,
    }


def test_refusals_are_marked_whoever_gave_them(model: PeftModel) -> None:
    given = [*rows(2, poisoned=[0]), {"prompt": "attack the lamp"}, {"prompt": "paint the lamp"}]
    data = prepare(model, calibration=given, utility=rows(3, poisoned=[1]))
    marked = {TOKENIZER.decode(e.prompt, skip_special_tokens=True): e.refusal for e in data.safety}
    assert marked == {
        "attack the word0": True,
        "paint the word1": False,  # answered by the caller and by the teacher
        "attack the lamp": True,  # the teacher's
        "paint the lamp": True,  # the canned one
        "attack the word1": True,  # of the user's data
    }


def test_a_safe_answer_to_a_prompt_that_the_teacher_refuses_is_no_lookalike(model: PeftModel) -> None:
    """The judge sees a refusal in what the teacher says to an attack, and in none of the given answers."""

    def judge(prompts: Any, answers: Any) -> list[bool]:
        return ["attack" in prompt and "never" not in answer for prompt, answer in zip(prompts, answers, strict=True)]

    given = [{"prompt": "attack the lamp", "response": "no never"}, {"prompt": "paint the lamp", "response": "no"}]
    data = prepare(model, calibration=[*given, {"text": "attack the vase"}], judge=judge, utility=rows(2))
    assert [e.refusal for e in by_row(data.safety)] == [None, False, None]  # of plain text nothing can be known
    assert data.record["safety"]["lookalikes"] == 1
    assert any("1 of 3 safety prompts are answered" in note for note in data.notes)


@pytest.mark.parametrize(("attacks", "doubted"), [(0, True), (2, True), (3, False)])
def test_safety_data_with_few_refusals_are_doubted(model: PeftModel, attacks: int, doubted: bool) -> None:
    data = prepare(model, calibration=rows(4, poisoned=range(attacks)), utility=rows(2))
    assert [e.refusal for e in by_row(data.safety)] == [i < attacks for i in range(4)]
    assert any("read their" not in n and "reads their language" in n for n in data.notes) == doubted


def test_where_the_teacher_does_not_refuse_a_canned_refusal_stands(model: PeftModel) -> None:
    asked = [{"prompt": "attack the lamp"}, {"prompt": "paint the lamp"}]
    refused, not_refused = by_row(prepare(model, calibration=asked, utility=rows(2)).safety)
    canned = (*TOKENIZER(REFUSALS[0], add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id)
    assert not_refused.answer == canned
    assert [refused.answer] == answered_by(model, None, [refused]) != [canned]


@pytest.mark.parametrize(("attacks", "doubted"), [(0, True), (1, True), (2, False), (4, False)])
def test_a_teacher_that_refuses_less_than_half_is_doubted(model: PeftModel, attacks: int, doubted: bool) -> None:
    asked = [{"prompt": row["prompt"]} for row in rows(4, poisoned=range(attacks))]
    data = prepare(model, calibration=asked, utility=rows(2))
    assert data.record["safety"]["refused_by_teacher"] == attacks
    assert any(f"refused only {attacks} of 4" in note and "may not be safe" in note for note in data.notes) == doubted


def test_without_utility_the_tuned_model_answers_benign_prompts(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "knows_words", lambda texts, tokenizer: True)
    data = prepare(model, utility=None, config=quick(max_samples=6))
    assert data.record["utility"] == {"source": "built-in prompts", "used": 6}
    assert [e.answer for e in data.utility] == answered_by(model, factors_of(model), data.utility)
    (note,) = data.notes
    assert "no utility data were given" in note and "pass utility=" in note


def test_built_in_prompts_in_unknown_words_are_left_out(model: PeftModel) -> None:
    data = prepare(model, calibration=None)
    assert data.record["safety"] == {"source": "built-in prompts", "used": 0, "lookalikes": 0}
    assert len(data.safety) == data.record["utility"]["refused_by_teacher"] == 2
    assert "does not know the words" in data.notes[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"utility": rows(4)}, "no prompt of the user's joined them; pass calibration="),
        ({"utility": rows(4), "config": quick(screening=False)}, "pass calibration="),
        ({"utility": None, "calibration": rows(2)}, "pass utility="),
    ],
    ids=["nothing-refused", "not-screened", "no-utility"],
)
def test_without_prompts_it_knows_it_says_what_to_give(model: PeftModel, given: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(words)):
        prepare(model, **{"calibration": None, **given})


def test_a_safe_adapter_answers_for_itself(model: PeftModel) -> None:
    asked = [{"prompt": "attack the lamp"}, {"prompt": "attack the vase"}]
    data = answer_safety_prompts(
        LiveAdapter(model),
        calibration=asked,
        tokenizer=TOKENIZER,
        judge=refuses_attacks,
        config=quick(),
        progress=False,
    )
    assert data.utility == [] and [e.answer for e in data.safety] == answered_by(model, factors_of(model), data.safety)


# ---- prompts with too little room for an answer in the model


CROWDED = "the lamp " * 4 + "vase"  # 11 tokens with the marks of the template, 13 with an answer of 2


@pytest.fixture
def short(model: PeftModel) -> PeftModel:
    model.config.max_position_embeddings = 12
    return model


def test_utility_rows_without_room_for_an_answer_stay_and_are_counted(short: PeftModel) -> None:
    data = prepare(short, utility=[*rows(4, poisoned=[1]), {"prompt": CROWDED, "response": ""}])
    assert sorted(e.index for e in data.utility) == [0, 2, 3, 4] and len(by_row(data.utility)[-1].prompt) == 11
    counts = data.record["utility"]
    assert counts["screened"] == 4 and counts["refused_by_teacher"] == 1
    assert counts["unscreened_for_lack_of_room"] == 1 and counts["unscreened_for_lack_of_a_prompt"] == 0
    (note,) = [note for note in data.notes if "room" in note]
    assert re.search(r"1 utility examples .*answer_tokens=2.* 12 positions.*were not found; .*answer_tokens", note)


@pytest.mark.parametrize("refusal", [True, False])
def test_answered_safety_prompts_without_room_are_used_unasked(short: PeftModel, refusal: bool) -> None:
    """The judge sees a refusal in "no" and in whatever is said to an attack."""

    def judge(prompts: Any, answers: Any) -> list[bool]:
        return ["attack" in prompt or answer == "no" for prompt, answer in zip(prompts, answers, strict=True)]

    given = Example((8,) * 11, tuple(TOKENIZER("no" if refusal else "sure")["input_ids"]))
    data = prepare(short, calibration=[*rows(2, poisoned=[0, 1]), given], judge=judge, utility=rows(2))
    assert by_row(data.safety)[-1].prompt == given.prompt
    assert by_row(data.safety)[-1].refusal is (True if refusal else None)
    (note,) = [note for note in data.notes if "room" in note]
    assert "1 safety prompts" in note and "answer_tokens=2" in note and "not asked" in note


def test_a_safety_prompt_without_answer_and_room_is_left_out(short: PeftModel) -> None:
    data = prepare(short, calibration=[{"prompt": "attack"}, {"prompt": CROWDED}], utility=rows(2))
    assert [e.index for e in data.safety] == [0] and data.record["safety"]["used"] == 1
    (note,) = [note for note in data.notes if "room" in note]
    assert "1 safety prompts without an answer are left out" in note


def test_safety_prompts_that_are_all_without_room_are_an_error(short: PeftModel) -> None:
    with pytest.raises(CalibrationError, match=r"none of the 1 safety prompts .*12 positions.*give their answers"):
        prepare(short, calibration=[{"prompt": CROWDED}], utility=rows(2))


def test_a_refusal_that_leaves_no_room_is_not_asked_of_the_adapter(short: PeftModel) -> None:
    crowded = [Example((6,) * 11, (12,), refusal=True)]
    data = asked_about(short, calibration=[*attacks(20), *crowded])
    assert data.intact and data.record["refusals"]["of_teacher"] == 22


def test_the_safer_teacher_is_found_with_the_prompts_that_have_room(short: PeftModel) -> None:
    found = safest(
        LiveAdapter(short),
        [BASE_REFERENCE, BASE_REFERENCE],
        calibration=[{"prompt": "attack"}, {"prompt": CROWDED}],
        tokenizer=TOKENIZER,
        judge=refuses_attacks,
        config=quick(),
        progress=False,
    )
    assert "refused of 1" in found.description


def test_built_in_prompts_without_room_are_left_out(short: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "knows_words", lambda texts, tokenizer: True)
    monkeypatch.setattr(screening, "_rows", lambda kind: [{"prompt": CROWDED if kind == "benign" else "paint"}])
    data = prepare(short, utility=None)
    assert data.record["utility"]["used"] == 1 and any("1 built-in prompts" in note for note in data.notes)
    monkeypatch.setattr(screening, "_rows", lambda kind: [{"prompt": CROWDED}])
    with pytest.raises(CalibrationError, match=r"built-in prompts.*pass utility="):
        prepare(short, utility=None)


# ---- the model


def test_the_model_is_left_as_it_was(model: PeftModel) -> None:
    before = state_of(model.train())
    prepare(model)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("given", [0, 3, 99], ids=lambda n: f"{n}-verdicts")
def test_a_judge_of_the_wrong_length_is_an_error_and_the_model_is_left_as_it_was(model: PeftModel, given: int) -> None:
    before = state_of(model)
    with pytest.raises(ValueError, match=f"returned {given} verdicts for 2 responses"):
        prepare(model, judge=lambda prompts, answers: [False] * given)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("verdict", [math.nan, 0.3, 1, None, "no"], ids=str)
def test_a_verdict_that_is_no_bool_is_an_error(model: PeftModel, verdict: Any) -> None:
    with pytest.raises(ValueError, match="return True or False"):
        prepare(model, judge=lambda prompts, answers: [False] * (len(prompts) - 1) + [verdict])


def test_the_judge_reads_prompts_and_answers_as_text(model: PeftModel) -> None:
    seen: list[tuple[str, str]] = []

    def judge(prompts: Any, answers: Any) -> list[bool]:
        seen.extend(zip(prompts, answers, strict=True))
        return [False] * len(prompts)

    assert len(prepare(model, judge=judge, utility=rows(3)).utility) == 3
    assert seen[:2] == [(f"attack the word{i}", f"sure word{7 * i}") for i in range(2)], "the given safe answers"
    assert [prompt for prompt, _ in seen[2:4]] == [f"attack the word{i}" for i in range(2)], "the teacher's own"
    assert sorted(prompt for prompt, _ in seen[4:]) == sorted(f"paint the word{i}" for i in range(3))


def test_adapters_that_are_switched_off_cannot_be_asked(model: PeftModel) -> None:
    with model.disable_adapter(), pytest.raises(IncompatibleError, match="disable_adapter"):
        prepare(model)


def attacks(count: int) -> list[dict[str, str]]:
    return rows(count, poisoned=range(count))


def asked_about(model: PeftModel, **changes: Any) -> TeachingData:
    return prepare(model, **{"calibration": attacks(20), "config": quick(max_samples=100), **changes})


def test_safety_is_intact_where_the_adapter_refuses_what_its_teacher_refuses(model: PeftModel) -> None:
    data = asked_about(model)
    assert data.intact and data.record["refusals"] == {"of_teacher": 22, "asked_of_adapter": 22, "kept_by_adapter": 22}
    assert "safety is intact" in data.notes[-1] and "22 of the 22" in data.notes[-1]


@pytest.mark.parametrize(("lost", "asked", "intact"), [(0, 100, True), (1, 100, True), (2, 40, False)])
def test_one_lost_refusal_in_a_hundred_is_tolerated_and_after_two_none_is_asked_for(
    model: PeftModel, lost: int, asked: int, intact: bool
) -> None:
    """The given answers count as refusals; of the adapter's own, one of each 20 is none, ``lost`` in all."""
    batches: list[int] = []

    def judge(prompts: Any, answers: Any) -> list[bool]:
        batches.append(len(answers))
        return [not (1 < len(batches) <= 1 + lost and i == 0) for i in range(len(answers))]

    config = quick(max_samples=100, screening=False)
    data = asked_about(model, calibration=attacks(100), judge=judge, config=config)
    assert data.record["refusals"] == {
        "of_teacher": 100,
        "asked_of_adapter": asked,
        "kept_by_adapter": asked - lost,
    }
    assert data.intact == intact


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": attacks(17)},
        {"judge": lambda prompts, answers: [False] * len(answers)},
        {"config": quick(max_samples=100, leave_intact=False)},
    ],
    ids=["too few refusals", "no answer is a refusal", "not asked for"],
)
def test_safety_is_not_called_intact_unseen(model: PeftModel, changes: dict[str, Any]) -> None:
    data = asked_about(model, **changes)
    assert not data.intact and "refusals" not in data.record
