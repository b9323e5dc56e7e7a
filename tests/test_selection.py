"""Who is restored equals the literal formulas, and less similar is never less likely to be restored."""

from typing import Any

import oracles
import pytest
import torch

from peft_nlsr.config import NLSRConfig
from peft_nlsr.selection import Decision, block_of, select

SETS = {
    "mixed": [0.3, -0.2, 0.9, 0.31, 0.0, 1.0, -1.0, 0.55, 0.54, 0.29],
    "ties": [0.5, 0.1, 0.5, 0.1, 0.5, 0.5, 0.9],
    "all-equal": [0.4] * 6,
    "nearly-equal": [1 - 1e-15 * i for i in range(9)],
    "two": [0.7, 0.6],
    "many": torch.rand(300, generator=torch.Generator().manual_seed(0)).tolist(),
}
RATES = [0.0, 0.25, 0.5, 0.75, 1.0]
DRAWN = {
    "middling": {"prune_probability": 0.5, "prune_increment": 0.2},
    "clipped-above": {"prune_probability": 0.8, "prune_increment": 0.9},
    "clipped-below": {"prune_probability": 0.1, "prune_increment": 0.6},
    "flat": {"prune_probability": 0.5, "prune_increment": 0.0},
}
WITH_PARAMETERS = [
    ("least_similar", {}),
    ("bernoulli", {}),
    ("bernoulli", DRAWN["clipped-above"]),
    ("threshold", {"similarity_threshold": 0.3}),
    ("all", {}),
]
NOT_INVERTED = pytest.mark.parametrize(
    ("selection", "knobs"),
    WITH_PARAMETERS,
    ids=["least_similar", "bernoulli", "bernoulli-clipped", "threshold", "all"],
)


def decide(similarities: list[float], selection: str, **changes: Any) -> list[Decision]:
    named = {f"model.layers.{i}.q_proj": s for i, s in enumerate(similarities)}
    return select(named, NLSRConfig(selection=selection, **changes))


def restored(decisions: list[Decision]) -> list[bool]:
    return [d.restored for d in decisions]


def chance(decision: Decision) -> float:
    return float(decision.restored) if decision.probability is None else decision.probability


# The formulas


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("similarities", SETS.values(), ids=SETS)
def test_least_similar_restores_the_lowest_share(similarities: list[float], rate: float) -> None:
    found = restored(decide(similarities, "least_similar", restore_rate=rate))
    assert found == oracles.least_similar(similarities, rate)
    assert sum(found) == round(rate * len(similarities))


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("similarities", SETS.values(), ids=SETS)
def test_threshold_restores_what_lies_below(similarities: list[float], threshold: float) -> None:
    found = restored(decide(similarities, "threshold", similarity_threshold=threshold))
    assert found == oracles.below_threshold(similarities, threshold)


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("knobs", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("similarities", SETS.values(), ids=SETS)
def test_bernoulli_leaves_alone_with_the_papers_probability_and_draw(
    similarities: list[float], knobs: dict[str, float], seed: int
) -> None:
    expected, left_alone = oracles.bernoulli_paper(similarities, *knobs.values(), draw=oracles.seeded_draw(seed))
    decisions = decide(similarities, "bernoulli", nlsr_seed=seed, **knobs)
    assert restored(decisions) == expected
    assert [d.probability for d in decisions] == (1.0 - left_alone).tolist()


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("knobs", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("similarities", SETS.values(), ids=SETS)
def test_bernoulli_released_restores_with_the_released_probability_and_draw(
    similarities: list[float], knobs: dict[str, float], seed: int
) -> None:
    expected, chances = oracles.bernoulli_released(similarities, *knobs.values(), draw=oracles.seeded_draw(seed))
    decisions = decide(similarities, "bernoulli_released", nlsr_seed=seed, **knobs)
    assert restored(decisions) == expected
    assert [d.probability for d in decisions] == chances.tolist()


@pytest.mark.parametrize("similarities", SETS.values(), ids=SETS)
def test_all_restores_all(similarities: list[float]) -> None:
    assert all(restored(decide(similarities, "all")))


@pytest.mark.parametrize("selection", ["bernoulli", "bernoulli_released"])
def test_the_reported_probability_is_how_often_it_happens(selection: str) -> None:
    draws = 600
    similarities = SETS["mixed"]
    runs = [decide(similarities, selection, nlsr_seed=seed) for seed in range(draws)]
    for i in range(len(similarities)):
        p = runs[0][i].probability
        assert p is not None
        share = sum(run[i].restored for run in runs) / draws
        assert abs(share - p) <= 4.5 * (p * (1 - p) / draws) ** 0.5 + 1e-12


# Order and direction


@NOT_INVERTED
@pytest.mark.parametrize("similarities", SETS.values(), ids=SETS)
def test_less_similar_is_never_less_likely_to_be_restored(
    similarities: list[float], selection: str, knobs: dict[str, float]
) -> None:
    decisions = sorted(decide(similarities, selection, **knobs), key=lambda d: d.similarity)
    chances = [chance(d) for d in decisions]
    assert chances == sorted(chances, reverse=True)


def test_the_released_selection_is_inverted() -> None:
    decisions = sorted(decide(SETS["mixed"], "bernoulli_released"), key=lambda d: d.similarity)
    chances = [chance(d) for d in decisions]
    assert chances == sorted(chances) and chances[0] < chances[-1]


@pytest.mark.parametrize("selection", ["least_similar", "bernoulli", "bernoulli_released"])
def test_ties_go_to_the_earlier_module(selection: str) -> None:
    first, *_, last = decide(SETS["all-equal"], selection)
    assert first.restored or chance(first) != chance(last)
    assert (chance(first) > chance(last)) != (selection == "bernoulli_released")


@NOT_INVERTED
def test_the_order_of_the_modules_only_matters_to_draws_and_ties(selection: str, knobs: dict[str, float]) -> None:
    similarities = {f"m{i}": s for i, s in enumerate(SETS["mixed"])}
    config = NLSRConfig(selection=selection, **knobs)
    forwards = {d.module: chance(d) for d in select(similarities, config)}
    backwards = {d.module: chance(d) for d in select(dict(reversed(similarities.items())), config)}
    assert forwards == backwards


@pytest.mark.parametrize("selection", ["least_similar", "bernoulli", "bernoulli_released", "threshold", "all"])
def test_decisions_keep_the_order_and_the_similarity_of_the_modules(selection: str) -> None:
    similarities = {f"m{i}": s for i, s in enumerate(SETS["mixed"])}
    decisions = select(similarities, NLSRConfig(selection=selection))
    assert {d.module: d.similarity for d in decisions} == similarities
    assert [d.module for d in decisions] == list(similarities)


@pytest.mark.parametrize("selection", ["bernoulli", "bernoulli_released"])
def test_draws_depend_on_the_seed_alone(selection: str) -> None:
    one = decide(SETS["many"], selection, nlsr_seed=1)
    torch.rand(7)
    assert one == decide(SETS["many"], selection, nlsr_seed=1)
    assert one != decide(SETS["many"], selection, nlsr_seed=2)


# One module, none, blocks

ALONE: dict[str, tuple[dict[str, Any], float]] = {
    "least-similar-none": ({"selection": "least_similar", "restore_rate": 0.0}, 0.0),
    "least-similar-half-rounds-to-even": ({"selection": "least_similar", "restore_rate": 0.5}, 0.0),
    "least-similar-all": ({"selection": "least_similar", "restore_rate": 1.0}, 1.0),
    "bernoulli": ({"selection": "bernoulli", "prune_probability": 0.5, "prune_increment": 0.2}, 0.3),
    "bernoulli-released": ({"selection": "bernoulli_released", "prune_probability": 0.5, "prune_increment": 0.2}, 0.3),
    "threshold": ({"selection": "threshold", "similarity_threshold": 0.6}, 1.0),
    "all": ({"selection": "all"}, 1.0),
}


@pytest.mark.parametrize(("knobs", "expected"), ALONE.values(), ids=ALONE)
def test_a_single_module_has_a_defined_chance(knobs: dict[str, Any], expected: float) -> None:
    (decision,) = select({"q_proj": 0.5}, NLSRConfig(**knobs))
    assert chance(decision) == pytest.approx(expected)


def test_no_module_is_an_error() -> None:
    with pytest.raises(ValueError, match="no module"):
        select({}, NLSRConfig())


BLOCKS = {
    "model.layers.0.q_proj": 0.9,
    "model.layers.0.v_proj": 0.1,
    "model.layers.1.q_proj": 0.6,
    "model.layers.10.q_proj": 0.2,
    "model.layers.1.v_proj": 0.8,
    "lm_head": 0.3,
}
MEANS = {"model.layers.0": 0.5, "model.layers.1": 0.7, "model.layers.10": 0.2, "lm_head": 0.3}


@pytest.mark.parametrize("selection", ["least_similar", "bernoulli", "bernoulli_released", "threshold", "all"])
def test_blocks_are_selected_as_one_by_their_mean_similarity(selection: str) -> None:
    of_module = select(BLOCKS, NLSRConfig(selection=selection, selection_unit="block"))
    of_block = {d.module: d for d in select(MEANS, NLSRConfig(selection=selection))}
    assert [d.module for d in of_module] == list(BLOCKS)
    for decision in of_module:
        block = of_block[block_of(decision.module)]
        assert (decision.restored, decision.probability) == (block.restored, block.probability)
        assert decision.similarity == BLOCKS[decision.module]


NAMES = {
    "model.layers.3.mlp.up_proj": "model.layers.3",
    "model.layers.13.self_attn.q_proj": "model.layers.13",
    "transformer.h.0.attn.c_attn": "transformer.h.0",
    "encoder.block.1.layer.0.SelfAttention.q": "encoder.block.1",
    "model.layers.2.mlp.experts.5.up_proj": "model.layers.2",
    "layers2.first.q1": "layers2.first.q1",
    "0.linear": "0",
    "layers.4": "layers.4",
    "lm_head": "lm_head",
}


@pytest.mark.parametrize(("module", "block"), NAMES.items(), ids=NAMES)
def test_the_block_of_a_module_is_its_name_up_to_the_first_number(module: str, block: str) -> None:
    assert block_of(module) == block
