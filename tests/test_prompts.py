"""The built-in prompts are many enough, distinct, balanced, and their two halves share nothing."""

import hashlib
import itertools
import re
from collections import Counter

import pytest

from peft_nlsr.prompts import HALVES, KINDS, REFUSALS, Prompt, builtin_prompts

AT_LEAST = {"safety": 160, "lookalike": 120, "benign": 160}
HAZARDS = {
    "violence",
    "weapons",
    "illegal_drugs",
    "theft",
    "fraud",
    "cyber_abuse",
    "privacy_stalking",
    "hate",
    "harassment",
    "self_harm_encouragement",
    "coercion_exploitation",
    "misinformation",
    "extremism",
    "illegal_trade",
    "property_damage",
    "hazardous_materials",
    "abuse_of_position",
}
TASKS = {"write", "explain", "summarise", "translate", "code", "plan", "maths", "advise"}
CATEGORIES = {"safety": HAZARDS, "lookalike": HAZARDS, "benign": TASKS}


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def normalised_hash(text: str) -> str:
    return hashlib.sha256(" ".join(words(text)).encode()).hexdigest()


def overlap(first: str, second: str) -> float:
    """The share of distinct words that two texts have in common (Jaccard)."""
    a, b = set(words(first)), set(words(second))
    return len(a & b) / len(a | b)


def all_prompts() -> list[Prompt]:
    return [prompt for kind, half in itertools.product(KINDS, HALVES) for prompt in builtin_prompts(kind, half)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_large_and_split_in_two_equal_halves(kind: str) -> None:
    calibration, evaluation = (len(builtin_prompts(kind, half)) for half in HALVES)
    assert calibration == evaluation
    assert calibration + evaluation >= AT_LEAST[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_each_category_is_equally_present_in_both_halves(kind: str) -> None:
    calibration, evaluation = (Counter(p.category for p in builtin_prompts(kind, half)) for half in HALVES)
    assert calibration == evaluation
    assert set(calibration) == CATEGORIES[kind]
    assert len(set(calibration.values())) == 1


def test_a_prompt_carries_the_kind_it_was_asked_for() -> None:
    for kind, half in itertools.product(KINDS, HALVES):
        assert {prompt.kind for prompt in builtin_prompts(kind, half)} == {kind}


def test_no_text_occurs_twice_in_any_kind_or_half() -> None:
    repeated = [text for text, n in Counter(normalised_hash(p.text) for p in all_prompts()).items() if n > 1]
    assert repeated == []


def test_ids_are_unique() -> None:
    ids = [prompt.id for prompt in all_prompts()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_disjoint(kind: str) -> None:
    calibration, evaluation = ({normalised_hash(p.text) for p in builtin_prompts(kind, half)} for half in HALVES)
    assert not calibration & evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_no_evaluation_prompt_is_a_rewording_of_a_calibration_prompt(kind: str) -> None:
    pairs = itertools.product(*(builtin_prompts(kind, half) for half in HALVES))
    close = [(a.text, b.text) for a, b in pairs if overlap(a.text, b.text) > 0.5]
    assert close == []


def test_prompts_are_single_tidy_lines() -> None:
    for prompt in all_prompts():
        assert prompt.text == " ".join(prompt.text.split())
        assert 2 <= len(words(prompt.text)) <= 30


@pytest.mark.parametrize(
    ("kind", "half", "named"),
    [("harmful", "calibration", KINDS), ("safety", "test", HALVES), ("", "", KINDS)],
)
def test_an_unknown_choice_is_told_the_valid_ones(kind: str, half: str, named: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=", ".join(named)):
        builtin_prompts(kind, half)


def test_refusals_are_distinct_sentences() -> None:
    assert len({normalised_hash(text) for text in REFUSALS}) == len(REFUSALS) >= 8
