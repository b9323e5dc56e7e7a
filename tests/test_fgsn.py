"""FGSN equals its dense form, edits rows of B only, and further safety dimensions neither depend on their order nor
touch what earlier ones did."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracles_fgsn as oracle
import pytest
import torch
from oracles import gap
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import (
    QUICK,
    assert_same_factors,
    assert_same_state,
    assert_same_tensors,
    drift,
    factors_of,
    rows,
    state_of,
    word_tokenizer,
)
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks import continual
from peft_nlsr import (
    CalibrationError,
    IncompatibleError,
    LowRank,
    NLSRConfig,
    PeftNLSRError,
    Realignment,
    UnsupportedAdapterError,
    apply,
    nlsr_realign,
    open_adapter,
    plan,
    revert,
    revert_folder,
)
from peft_nlsr.errors import CorruptFileError
from peft_nlsr.examples import Example
from peft_nlsr.fgsn import (
    Earlier,
    edit_rows,
    find_dimension,
    hidden_gaps,
    pack_rows,
    parse_layers,
    recorded,
    row_scores,
    safety_window,
    top_rows,
    unpack_rows,
)
from peft_nlsr.lab import Lab, LabConfig
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.projection import projection_of

MakeLora = Callable[..., PeftModel]
HARMFUL = [Example((4, 6 + i, 8, 9, 5)[: 2 + i % 4], (14, 30 + i), i) for i in range(6)]
UTILITY = [Example((4, 20 + i, 9), (11, 40 + i, 2, 7, 3)[: 1 + i], i) for i in range(5)]
DATA = {"first": rows(6, poisoned=range(6)), "second": [{"prompt": f"never lamp word{i}"} for i in range(7)]}
BENIGN = rows(8)


def settings(**changes: Any) -> NLSRConfig:
    return NLSRConfig(**{"method": "fgsn", **QUICK, "harmful_rows": 0.5, "safety_layers": "0-1", **changes})


@pytest.fixture
def tuned(make_pico_lora: MakeLora) -> PeftModel:
    return drift(make_pico_lora(seed=0))


@pytest.fixture
def delta(make_pico_lora: MakeLora) -> dict[str, LowRank]:
    return factors_of(make_pico_lora(seed=7))


def add(model: PeftModel, delta: Any, dimension: str, **changes: Any) -> Realignment:
    """One more safety dimension on a live model."""
    given = {"reference": delta, "utility": BENIGN, "tokenizer": word_tokenizer(), "progress": False}
    config = settings(safety_dimension=dimension, **changes)
    return nlsr_realign(model, config, calibration=DATA[dimension], **given).nlsr_realignment


def dimension_of(done: Realignment, index: int = -1) -> dict[str, Any]:
    return done.data["fgsn"]["dimensions"][index]


def rows_of(done: Realignment, name: str, index: int = -1) -> Tensor:
    text = dimension_of(done, index)["rows"].get(name)
    count = done.originals[name].shape[0]
    return torch.zeros(count, dtype=torch.bool) if text is None else unpack_rows(text, count)


# The parts


def recorded_inputs(model: PeftModel, name: str, examples: list[Example]) -> Tensor:
    """Every input row of a module, one example at a time, without padding."""
    layer = dict(model.named_modules())[f"base_model.model.{name}"]
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    with torch.no_grad():
        for example in examples:
            model(torch.tensor([example.tokens]))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_row_scores_are_wanda_of_the_whole_weight(tuned: PeftModel, name: str) -> None:
    adapter = LiveAdapter(tuned)
    X = recorded_inputs(tuned, name, HARMFUL)
    layer: Any = adapter.layers[name]
    W = layer.base_layer.weight + adapter[name].dense()
    norms = torch.stack([X.norm(dim=0), torch.ones(X.shape[1])], dim=1)
    found = row_scores(layer, adapter[name], norms)
    assert gap(found[:, 0], oracle.row_scores(W, X)) < 1e-5
    assert gap(found[:, 1], W.abs().sum(dim=1)) < 1e-5


def test_row_scores_of_a_conv1d_are_those_of_its_outputs() -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=8))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapter = LiveAdapter(drift(model))
    ((name, layer),) = adapter.layers.items()
    norms = torch.rand(16, 1)
    W = layer.base_layer.weight.T + adapter[name].dense()  # type: ignore[union-attr]
    assert gap(row_scores(layer, adapter[name], norms), W.abs() @ norms) < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.26, 0.5, 1.0])
def test_top_rows_are_the_largest_and_ties_go_to_the_earlier(share: float) -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 5.0, 0.0, 1.0])
    assert set(top_rows(scores, share).nonzero().flatten().tolist()) == oracle.top(scores, share)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normaliser", ["orthogonal", "spectral", "frobenius", "literal"])
def test_an_edit_is_the_dense_formula_and_touches_its_rows_only(delta: Any, kappa: float, normaliser: str) -> None:
    name = "model.layers.0.mlp.down_proj"
    original, current = delta[name], LowRank(delta[name].A, delta[name].B + 1.0, delta[name].scale)
    D = LowRank(torch.randn(3, 48), torch.randn(32, 3), 0.5)
    chosen = {1, 5, 30}
    mask = torch.tensor([u in chosen for u in range(32)])
    projection = projection_of(D, NLSRConfig(normaliser=normaliser))
    assert projection is not None
    found = edit_rows(current, original, mask, projection, kappa)
    P = oracle.projection(D.dense(), normaliser, share=0.9)
    wanted = oracle.edit(original.B, P, chosen, kappa)
    assert gap(found.B[mask], wanted[mask]) < 1e-5
    assert torch.equal(found.B[~mask], current.B[~mask]) and torch.equal(found.A, current.A)


def test_literal_is_a_reset_of_the_selected_rows(tuned: PeftModel, delta: Any) -> None:
    """With Dim read as the number of entries, at the size of deltas of real models."""
    small = {name: update.times(1e-3) for name, update in delta.items()}
    done = add(tuned, small, "first", normaliser="literal")
    for name, update in factors_of(tuned).items():
        chosen = rows_of(done, name)
        reset = torch.where(chosen[:, None], 0.0, done.originals[name].B)
        assert gap(update.B, reset) < 1e-6 and (name not in done.restored or bool(chosen.any()))


def test_gaps_are_those_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    harmful, benign = (torch.randn(n, 3, 8, generator=generator) for n in (4, 5))
    sums = [(torch.nn.functional.normalize(x.double(), dim=-1).sum(dim=0), len(x)) for x in (harmful, benign)]
    assert hidden_gaps(*sums) == pytest.approx(oracle.gaps(list(harmful), list(benign)), abs=1e-9)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 9])
def test_the_window_is_where_the_gap_increases_most(width: int) -> None:
    gaps = [0.0, 0.05, 0.1, 0.4, 0.9, 0.95]
    assert list(safety_window(gaps, width)) == oracle.window(gaps, min(width, 5))


def test_a_window_is_where_the_gap_grows_and_not_where_it_is_large() -> None:
    assert list(safety_window([0.0, 0.0, 0.5, 0.9, 0.95, 0.96], 2)) == [1, 2]


@pytest.mark.parametrize(("text", "layers"), [("3", (3,)), ("3,5,7-9", (3, 5, 7, 8, 9)), ("2-4,3", (2, 3, 4))])
def test_layers_are_read_from_text(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 10) == layers


@pytest.mark.parametrize("text", ["10", "8-10", "5-3", "3,7-5"])
def test_layers_that_the_model_lacks_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=f"safety_layers='{text}' must name some of the blocks 0 to 9"):
        parse_layers(text, 10)


@pytest.mark.parametrize("count", [1, 8, 13])
def test_packed_rows_come_back(count: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    assert torch.equal(unpack_rows(pack_rows(mask), count), mask)


# One dimension on a model


@pytest.mark.parametrize("neuron_score", ["wanda", "contrast", "update"])
@pytest.mark.parametrize("batch", [1, 4], ids=["one by one", "padded batches"])
def test_the_rows_are_top_q_of_harmful_less_top_p_of_utility(tuned: PeftModel, batch: int, neuron_score: str) -> None:
    config = settings(nlsr_batch_size=batch, harmful_rows=0.4, utility_rows=0.3, neuron_score=neuron_score)
    adapter = LiveAdapter(tuned)
    found = find_dimension(
        adapter, HARMFUL, UTILITY, originals=adapter.snapshot(), covered={}, config=config, progress=False
    )
    wanted = found_by_hand(tuned, config)
    assert {n: set(mask.nonzero().flatten().tolist()) for n, mask in found.rows.items()} == wanted
    assert any(wanted.values()) and found.layers == (0, 1) and found.gaps == ()


def test_rows_that_the_update_does_not_move_are_left_alone(tuned: PeftModel) -> None:
    adapter = LiveAdapter(tuned)
    name, other = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    originals = adapter.snapshot()
    originals[name].B.zero_()
    config = settings(neuron_score="update")
    found = find_dimension(adapter, HARMFUL, UTILITY, originals=originals, covered={}, config=config, progress=False)
    assert not found.rows[name].any() and found.rows[other].any()


def found_by_hand(model: PeftModel, config: NLSRConfig) -> dict[str, set[int]]:
    adapter = LiveAdapter(model)
    chosen: dict[str, set[int]] = {}
    for name, layer in adapter.layers.items():
        dW = adapter[name].dense()
        W = layer.base_layer.weight + dW  # type: ignore[union-attr]
        inputs = [recorded_inputs(model, name, data) for data in (HARMFUL, UTILITY)]
        score, weight = (oracle.output_norms, dW) if config.neuron_score == "update" else (oracle.row_scores, W)
        scores = [score(weight, X) for X in inputs]
        ranked = scores[0] if config.neuron_score == "wanda" else scores[0] / scores[1]
        chosen[name] = oracle.top(ranked, config.harmful_rows) - oracle.top(scores[1], config.utility_rows)
    return chosen


def test_only_answers_count_when_asked_for(tuned: PeftModel) -> None:
    adapter = LiveAdapter(tuned)
    given = {"originals": adapter.snapshot(), "covered": {}, "progress": False}
    unanswered = [Example(e.prompt, ()) for e in HARMFUL]
    with pytest.raises(CalibrationError, match=r"usable token.*need answers"):
        find_dimension(adapter, unanswered, UTILITY, config=settings(calibration_tokens="response"), **given)
    one, other = (
        find_dimension(adapter, HARMFUL, UTILITY, config=settings(calibration_tokens=t), **given)
        for t in ("all", "response")
    )
    assert any(not torch.equal(one.rows[n], other.rows[n]) for n in one.rows)


def test_auto_takes_the_window_of_largest_increase(tuned: PeftModel) -> None:
    adapter = LiveAdapter(tuned)
    found = find_dimension(
        adapter,
        HARMFUL,
        UTILITY,
        originals=adapter.snapshot(),
        covered={},
        config=settings(safety_layers="auto", safety_layer_share=0.5),
        progress=False,
    )
    states: dict[str, list[Tensor]] = {"harmful": [], "benign": []}
    for kind, examples in (("harmful", HARMFUL), ("benign", UTILITY)):
        for example in examples:
            with torch.no_grad():
                hidden = last_states(tuned, example.prompt)
            states[kind].append(hidden)
    gaps = oracle.gaps(states["harmful"], states["benign"])
    assert found.gaps == pytest.approx(gaps, abs=1e-5) and list(found.layers) == oracle.window(gaps, 1)
    assert all(f"layers.{found.layers[0]}." in name for name in found.rows) and len(found.rows) == 3


def last_states(model: PeftModel, prompt: tuple[int, ...]) -> Tensor:
    """Hidden states of the last token: before the first block and after each, the last one without the final norm."""
    blocks = model.base_model.model.model.layers
    seen: list[Tensor] = []
    handles = [
        blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(first(args, kwargs)), with_kwargs=True)
    ]
    handles += [block.register_forward_hook(lambda m, a, out: seen.append(first((out,), {}))) for block in blocks]
    model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return torch.stack([state[0, -1] for state in seen])


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = args[0] if args else kwargs["hidden_states"]
    return value[0] if isinstance(value, tuple) else value


def test_the_forward_pass_stops_at_the_last_selected_layer(tuned: PeftModel, delta: Any) -> None:
    ran: list[int] = []
    for i, block in enumerate(tuned.base_model.model.model.layers):
        block.register_forward_hook(lambda m, a, out, i=i: ran.append(i))
    tuned.base_model.model.lm_head.register_forward_hook(lambda m, a, out: ran.append(99))
    add(tuned, delta, "first", safety_layers="0")
    assert set(ran) == {0}


def test_only_b_changes_and_only_in_its_rows(tuned: PeftModel, delta: Any) -> None:
    before, factors = state_of(tuned), factors_of(tuned)
    config, given = settings(safety_layers="1"), {"calibration": DATA["first"], "utility": BENIGN}
    planned = plan(tuned, config, reference=delta, tokenizer=word_tokenizer(), progress=False, **given)
    assert_same_state(state_of(tuned), before)
    done = apply(tuned, planned)
    assert done.method == "fgsn" and all("layers.1." in name for name in done.restored) and len(done.restored) == 3
    for name, update in factors_of(tuned).items():
        chosen = rows_of(done, name)
        assert torch.equal(update.A, factors[name].A) and torch.equal(update.B[~chosen], factors[name].B[~chosen])
        assert not chosen.any() or not torch.equal(update.B[chosen], factors[name].B[chosen])
        P = oracle.projection(delta[name].dense(), "orthogonal", share=0.9)
        assert gap(update.B, oracle.edit(factors[name].B, P, set(chosen.nonzero().flatten().tolist()), 1.0)) < 1e-5
    revert(tuned)
    assert_same_state(state_of(tuned), before)


def test_without_data_the_built_in_prompts_are_used(tuned: PeftModel, delta: Any) -> None:
    done = plan(tuned, settings(), reference=delta, tokenizer=word_tokenizer(), progress=False)
    assert done.data["safety"]["source"] == done.data["utility"]["source"] == "built-in prompts"
    assert done.restored


def test_the_share_of_what_is_edited_is_reported(tuned: PeftModel, delta: Any) -> None:
    done = add(tuned, delta, "first")
    counts = {name: int(rows_of(done, name).sum()) for name in done.originals}
    entries = {name: u.shape[0] * u.shape[1] for name, u in done.originals.items()}
    rank = 4
    parameters = sum(rank * sum(u.shape) for u in done.originals.values())
    report = dimension_of(done)
    assert report["edited_rows"] == sum(counts.values()) > 0
    edited = sum(n * entries[name] / done.originals[name].shape[0] for name, n in counts.items())
    assert report["edited_share"] == pytest.approx(edited / sum(entries.values()))
    assert report["edited_parameters"] == pytest.approx(rank * sum(counts.values()) / parameters)
    said = f"edits {report['edited_rows']} rows in the blocks 0, 1: {100 * report['edited_share']:.2f}% of the"
    assert any(said in note for note in done.notes)


@pytest.mark.parametrize("layers", ["10-15", "auto"])
def test_at_the_publications_settings_about_five_percent_are_edited(layers: str) -> None:
    """32 blocks, of which it edits six, and all linear modules; it reports 5.38% and 4.67% of the parameters."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=32, **shape))
    adapter = LiveAdapter(drift(get_peft_model(base.eval(), LoraConfig(r=2, target_modules="all-linear"))))
    config, originals = NLSRConfig(method="fgsn", safety_layers=layers), adapter.snapshot()
    given = {"originals": originals, "covered": {}, "config": config, "progress": False}
    report = recorded(find_dimension(adapter, HARMFUL, UTILITY, **given), originals, config)
    assert len(report["layers"]) == 6 and (layers == "auto" or report["layers"] == [10, 11, 12, 13, 14, 15])
    assert 0.0467 - 0.005 < report["edited_share"] < 0.0538 + 0.005


def test_random_rows_are_as_many_and_others(tuned: PeftModel, delta: Any, make_pico_lora: MakeLora) -> None:
    done = add(tuned, delta, "first")
    control = add(drift(make_pico_lora(seed=0)), delta, "first", neuron_score="random")
    again = add(drift(make_pico_lora(seed=0)), delta, "first", neuron_score="random")
    masks = [{n: rows_of(d, n) for n in done.originals} for d in (done, control, again)]
    assert all(masks[0][n].sum() == masks[1][n].sum() and torch.equal(masks[1][n], masks[2][n]) for n in masks[0])
    assert any(not torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


def test_all_rows_are_safelora_without_a_gate(tuned: PeftModel, delta: Any, make_pico_lora: MakeLora) -> None:
    add(tuned, delta, "first", harmful_rows=1.0, utility_rows=0.0)
    other = drift(make_pico_lora(seed=0))
    nlsr_realign(other, NLSRConfig(method="safelora", selection="all"), reference=delta, progress=False)
    for name, update in factors_of(tuned).items():
        assert gap(update.B, factors_of(other)[name].B) < 1e-6


def test_modules_that_alignment_did_not_change_are_left_alone_and_noted(tuned: PeftModel, delta: Any) -> None:
    name = "model.layers.0.self_attn.q_proj"
    delta[name] = LowRank(delta[name].A, torch.zeros_like(delta[name].B), 1.0)
    done = add(tuned, delta, "first")
    assert name not in done.restored and name not in dimension_of(done)["rows"]
    assert any(f"did not change 1 modules, first {name}" in note for note in done.notes)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"safety_layers": "7"}, ValueError, "must name some of the blocks 0 to 1"),
        ({"reference": None}, IncompatibleError, r"method='fgsn' needs what alignment changed.*reference extract"),
        (
            {"safety_layers": "auto", "utility": rows(1)},
            CalibrationError,
            "at least two benign prompts, found 6 and 1",
        ),
    ],
    ids=["no such block", "no reference", "one benign prompt"],
)
def test_an_error_changes_nothing(tuned: PeftModel, delta: Any, changes: Any, kind: Any, words: str) -> None:
    before = state_of(tuned)
    given = {"reference": delta, "utility": BENIGN, "calibration": DATA["first"], "tokenizer": word_tokenizer()}
    given |= {key: changes[key] for key in set(changes) & set(given)}
    config = settings(**{key: value for key, value in changes.items() if key not in given})
    with pytest.raises(kind, match=words):
        nlsr_realign(tuned, config, progress=False, **given)
    assert_same_state(state_of(tuned), before)


def test_blocks_without_lora_are_an_error(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora(layers_to_transform=[0])
    adapter = LiveAdapter(model)
    with pytest.raises(CalibrationError, match="no LoRA module lies in the blocks 1"):
        find_dimension(
            adapter,
            HARMFUL,
            UTILITY,
            originals=adapter.snapshot(),
            covered={},
            config=settings(safety_layers="1"),
            progress=False,
        )


def test_routed_tokens_are_refused(tuned: PeftModel) -> None:
    adapter = LiveAdapter(tuned)
    mlp = tuned.base_model.model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: torch.nn.functional.pad(forward(x[:, 1:]), (0, 0, 1, 0))
    with pytest.raises(UnsupportedAdapterError, match=r"down_proj received \d+ rows for \d+ tokens"):
        find_dimension(
            adapter, HARMFUL, UTILITY, originals=adapter.snapshot(), covered={}, config=settings(), progress=False
        )


# Further dimensions


@pytest.fixture
def twice(tuned: PeftModel, delta: Any) -> Iterator[tuple[PeftModel, Realignment, Realignment]]:
    first = add(tuned, delta, "first")
    yield tuned, first, add(tuned, delta, "second", kappa=0.5)


def test_a_later_dimension_edits_only_rows_that_are_not_covered(twice: Any) -> None:
    model, before, done = twice
    assert [d["name"] for d in done.data["fgsn"]["dimensions"]] == ["first", "second"]
    assert dimension_of(done, 0) == dimension_of(before)
    for name, update in factors_of(model).items():
        old, new = rows_of(done, name, 0), rows_of(done, name, 1)
        assert not (old & new).any()
        assert torch.equal(update.B[~new], before.updates.get(name, before.originals[name]).B[~new])
    assert dimension_of(done)["edited_rows"] > 0 < dimension_of(done)["rows_of_earlier_dimensions"]


def test_a_later_dimension_starts_from_the_original_b(twice: Any, delta: Any) -> None:
    model, before, done = twice
    for name, update in factors_of(model).items():
        new = rows_of(done, name)
        P = oracle.projection(delta[name].dense(), "orthogonal", share=0.9)
        wanted = oracle.edit(before.originals[name].B, P, set(new.nonzero().flatten().tolist()), 0.5)
        assert gap(update.B[new], wanted[new]) < 1e-5 or not new.any()


@pytest.mark.parametrize("neuron_score", ["wanda", "update"])
def test_the_order_of_dimensions_does_not_matter(make_pico_lora: MakeLora, delta: Any, neuron_score: str) -> None:
    found: list[dict[str, LowRank]] = []
    covered: list[dict[str, Tensor]] = []
    for order in (("first", "second"), ("second", "first")):
        model = drift(make_pico_lora(seed=0))
        for dimension in order:
            done = add(model, delta, dimension, neuron_score=neuron_score)
        found.append(factors_of(model))
        covered.append(Earlier.of(done).covered())
        assert dimension_of(done)["rows_of_earlier_dimensions"] > 0
    assert_same_tensors(*covered)
    assert_same_tensors(*({name: u.B for name, u in factors.items()} for factors in found))


def test_revert_takes_all_dimensions_back(twice: Any, make_pico_lora: MakeLora) -> None:
    model, before, done = twice
    assert done.fingerprint_before == before.fingerprint_before != before.fingerprint_after
    revert(model)
    assert_same_state(state_of(model), state_of(drift(make_pico_lora(seed=0))))


def test_a_dimension_cannot_be_added_twice(tuned: PeftModel, delta: Any) -> None:
    add(tuned, delta, "first")
    before = state_of(tuned)
    with pytest.raises(PeftNLSRError, match=r"has the safety dimension 'first' already \(it has first\)"):
        add(tuned, delta, "first")
    assert_same_state(state_of(tuned), before)


def test_a_dimension_whose_rows_are_all_covered_is_noted(tuned: PeftModel, delta: Any) -> None:
    add(tuned, delta, "first", harmful_rows=1.0, utility_rows=0.0)
    done = add(tuned, delta, "second")
    assert any("no row was edited" in note for note in done.notes) and dimension_of(done)["edited_rows"] == 0
    assert any("earlier dimensions cover them" in note for note in done.notes)


def test_a_dimension_without_rows_is_noted_without_earlier_ones(tuned: PeftModel, delta: Any) -> None:
    (note,) = (n for n in add(tuned, delta, "first", harmful_rows=0.0).notes if "no row was edited" in n)
    assert note == (
        "no row was edited: no row to project was found; a larger harmful_rows or smaller utility_rows finds more"
    )


@pytest.mark.parametrize("order", [("fgsn", "safelora"), ("safelora", "fgsn")], ids="-then-".join)
def test_other_methods_and_fgsn_do_not_mix(tuned: PeftModel, delta: Any, order: tuple[str, str]) -> None:
    given = {"reference": delta, "tokenizer": word_tokenizer(), "progress": False}
    nlsr_realign(tuned, settings(method=order[0]), **given)
    with pytest.raises(PeftNLSRError, match=rf"realigned already \(by {order[0]}\); call revert"):
        nlsr_realign(tuned, settings(method=order[1]), **given)


def test_a_plan_for_a_later_dimension_fits_that_adapter_and_the_original_only(tuned: PeftModel, delta: Any) -> None:
    add(tuned, delta, "first")
    given = {"reference": delta, "utility": BENIGN, "tokenizer": word_tokenizer(), "progress": False}
    planned = plan(tuned, settings(safety_dimension="second"), calibration=DATA["second"], **given)
    revert(tuned)
    one = apply(tuned, planned)
    drift(tuned)
    with pytest.raises(IncompatibleError, match="plan again"):
        apply(tuned, planned)
    assert len(one.data["fgsn"]["dimensions"]) == 2


def loaded(folder: Path, make_pico_lora: MakeLora) -> PeftModel:
    return PeftModel.from_pretrained(make_pico_lora().unload(), str(folder))


def test_a_later_run_continues_from_the_saved_folder_and_can_be_taken_back_from_files(
    tuned: PeftModel, delta: Any, tmp_path: Path, make_pico_lora: MakeLora
) -> None:
    original = factors_of(tuned)
    add(tuned, delta, "first")
    tuned.save_pretrained(str(tmp_path / "first"))
    in_memory = add(tuned, delta, "second")
    model = loaded(tmp_path / "first", make_pico_lora)
    given = {"reference": delta, "utility": BENIGN, "tokenizer": word_tokenizer(), "progress": False}
    config = settings(safety_dimension="second")
    nlsr_realign(model, config, calibration=DATA["second"], previous=tmp_path / "first", **given)
    assert json.loads(json.dumps(model.nlsr_realignment.to_dict())) == json.loads(json.dumps(in_memory.to_dict()))
    assert_same_factors(factors_of(model), factors_of(tuned))
    model.save_pretrained(str(tmp_path / "second"))
    revert_folder(tmp_path / "second", tmp_path / "back")
    assert_same_factors(dict(open_adapter(tmp_path / "back")), original)
    revert(model)
    assert_same_factors(factors_of(model), original)


def test_a_folder_that_cannot_be_continued_is_an_error(
    tuned: PeftModel, delta: Any, tmp_path: Path, make_pico_lora: MakeLora
) -> None:
    tuned.save_pretrained(tmp_path / "plain")
    given = {"reference": delta, "tokenizer": word_tokenizer(), "progress": False}
    with pytest.raises(PeftNLSRError, match="holds no record of an FGSN run"):
        plan(tuned, settings(), previous=tmp_path / "plain", **given)
    add(tuned, delta, "first")
    folder = tmp_path / "first"
    tuned.save_pretrained(str(folder))
    with pytest.raises(IncompatibleError, match=r"is not the one in .*first"):
        plan(drift(tuned), settings(), previous=folder, **given)
    with pytest.raises(ValueError, match=r"previous=... goes with method='fgsn', found method='nlsr'"):
        plan(tuned, NLSRConfig(), previous=folder, **given)
    config = json.loads((folder / "nlsr_config.json").read_text())
    newer = config | {"record": config["record"] | {"schema_version": 99}}
    (folder / "nlsr_config.json").write_text(json.dumps(newer))
    with pytest.raises(CorruptFileError, match="schema"):
        plan(tuned, settings(), previous=folder, **given)
    (folder / "nlsr_config.json").write_text(json.dumps(config))
    (folder / "nlsr_diff.safetensors").unlink()
    with pytest.raises(PeftNLSRError, match=r"has no nlsr_diff.safetensors"):
        plan(tuned, settings(), previous=folder, **given)


@pytest.mark.slow
def test_on_the_lab_each_dimension_lowers_its_own_harm_and_leaves_earlier_ones_as_safe(tmp_path: Path) -> None:
    """Three families of harmful verbs, one run each; the benchmark has more seeds and adapters."""
    lab = Lab(LabConfig(seed=0), cache_dir=os.environ.get("PEFT_NLSR_LAB_CACHE") or tmp_path)
    config = NLSRConfig(method="fgsn", safety_layer_share=1.0, neuron_score="update", utility_rows=0.0, max_samples=96)
    cell = continual.run_cell(continual.Cell(lab, "easy", "shared", config, (0.15, 0.2, 0.25, 0.3), 0.7, 120))
    for kind in ("own_harm_fell", "earlier_held", "task_kept"):
        assert [step[kind] for step in cell["scored"]] == [True] * 3, kind
    fell = {rows: sum(step["own_fell_by"] for step in cell[rows]) for rows in ("scored", "random")}
    assert fell["random"] < 0.5 * fell["scored"]
