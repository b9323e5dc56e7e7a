"""Statistics are those of every counted token, each sample on its own, however the data are batched and padded."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from conftest import randomise_lora
from oracles import Row, assert_same_state, gap, lora_layers, pad, random_factors, random_rows, state_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_nlsr.calibration import (
    RECORD_NAME,
    TENSORS_NAME,
    FrequentDirections,
    SafetyStatistics,
    collect_sequential,
    collect_statistics,
)
from peft_nlsr.config import NLSRConfig
from peft_nlsr.errors import (
    CalibrationError,
    CorruptFileError,
    IncompatibleError,
    PeftNLSRError,
    UnsupportedAdapterError,
)
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.lowrank import LowRank
from peft_nlsr.scores import low_rank_factors, rank_kept, safety_masks

MakeLora = Callable[..., PeftModel]
SINGLE = 1e-5  # sums of float32 products, compared with float64 ones
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


ROWS = random_rows(7, seed=1)
FEW, REJECTED = random_rows(4, seed=6), random_rows(4, seed=5)


def collect(model: Any, batches: Any, **settings: Any) -> SafetyStatistics:
    return collect_statistics(model, batches, progress=False, **settings)


def assert_same_statistics(found: SafetyStatistics, expected: SafetyStatistics) -> None:
    assert list(found) == list(expected)
    for name, mine in found.items():
        theirs = expected[name]
        assert mine.tokens == theirs.tokens
        for kind in ("z_gram", "x_square", "x_code", "grad_A", "grad_B"):
            one, other = getattr(mine, kind), getattr(theirs, kind)
            assert (one is None) == (other is None)
            assert one is None or gap(one, other) < SINGLE, (name, kind)
        assert (mine.moment is None) == (theirs.moment is None)
        if mine.moment is not None and theirs.moment is not None:
            assert gap(mine.moment.full, theirs.moment.full) < SINGLE


def assert_sums(found: SafetyStatistics, model: PeftModel, X: dict[str, Tensor], factors: Any = None) -> None:
    """Each module's sums are those of its inputs `X (tokens, d_in)`."""
    used = factors or LiveAdapter(model).snapshot()
    assert set(found) == set(X)
    for name, mine in found.items():
        Z = X[name] @ used[name].A.double().T
        assert mine.tokens == len(X[name])
        assert gap(mine.z_gram, Z.T @ Z) < SINGLE, name
        assert gap(mine.x_square, X[name].square().sum(dim=0)) < SINGLE, name
        if mine.x_code is not None:
            assert gap(mine.x_code, X[name].T @ Z) < SINGLE, name
        if mine.moment is not None:
            assert gap(mine.moment.full, X[name].T @ X[name]) < SINGLE, name


def unpadded_inputs(model: PeftModel, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What every LoRA layer is given, sample after sample without any padding."""
    model = oracles.float64_copy(model, "default")
    return oracles.recorded_inputs(model, lora_layers(model, "default"), samples, None)


# Which tokens, in which batches


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_sums_are_those_of_the_counted_tokens(make_pico_lora: MakeLora, tokens: str) -> None:
    model, batch = make_pico_lora(), pad(ROWS)
    kept = batch["attention_mask"].bool() if tokens == "all" else batch["labels"] != -100
    X = oracles.module_inputs(model, "default", [batch], [kept])
    assert_sums(collect(model, [batch], tokens=tokens, codes=True, moments=True), model, X)


def test_padding_is_never_counted(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora()
    X = unpadded_inputs(model, [pad([row]) for row in ROWS])
    assert_sums(collect(model, [pad(ROWS, extra=3)], codes=True, moments=True), model, X)


def test_labels_on_padding_are_not_an_answer(make_pico_lora: MakeLora) -> None:
    model, batch = make_pico_lora(), pad(ROWS)
    careless = {**batch, "labels": torch.where(batch["attention_mask"] == 1, batch["labels"], 0)}
    found, expected = (collect(model, [b], tokens="response") for b in (careless, batch))
    assert_same_statistics(found, expected)


SPLITS: dict[str, list[dict[str, Tensor]]] = {
    "one-by-one": [pad([row]) for row in ROWS],
    "uneven": [pad(ROWS[:2]), pad(ROWS[2:])],
    "left-padding": [pad(ROWS, side="left")],
    "long-padding": [pad(ROWS, extra=9)],
    "long-left-padding-and-uneven": [pad(ROWS[:5], side="left", extra=9), pad(ROWS[5:], side="left")],
    "another-order": [pad(ROWS[::-1])],
}


@pytest.mark.parametrize("gradients", [None, "snip"], ids=["no-gradients", "snip"])
@pytest.mark.parametrize("tokens", ["all", "response"])
@pytest.mark.parametrize("batches", SPLITS.values(), ids=SPLITS)
def test_the_same_rows_give_the_same_statistics_in_any_batches(
    make_pico_lora: MakeLora, batches: list[dict[str, Tensor]], tokens: str, gradients: str | None
) -> None:
    model = make_pico_lora()
    settings: Any = {"tokens": tokens, "gradients": gradients, "moments": True}
    assert_same_statistics(collect(model, batches, **settings), collect(model, [pad(ROWS)], **settings))


def test_the_number_of_threads_does_not_matter(make_pico_lora: MakeLora) -> None:
    model, threads = make_pico_lora(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = collect(model, [pad(ROWS)], gradients="snip", codes=True, moments=True)
        torch.set_num_threads(2)
        together = collect(model, [pad(ROWS)], gradients="snip", codes=True, moments=True)
    finally:
        torch.set_num_threads(threads)
    assert_same_statistics(together, alone)


def test_a_missing_attention_mask_counts_every_token(make_pico_lora: MakeLora) -> None:
    model, ids = make_pico_lora(), torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    bare, masked_batch = {"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_same_statistics(collect(model, [bare]), collect(model, [masked_batch]))
    bare_too, masked_too = (
        collect_sequential(model, [batch], factors=None, config=NLSRConfig(), progress=False)
        for batch in (bare, masked_batch)
    )
    assert_same_statistics(bare_too, masked_too)


@pytest.mark.parametrize("run_with_factors", [True, False], ids=["run-with-factors", "only-code-with-factors"])
def test_given_factors_make_the_code_and_if_asked_the_activations(
    make_pico_lora: MakeLora, run_with_factors: bool
) -> None:
    model, other = make_pico_lora(), make_pico_lora(seed=3, r=6)
    factors, batch = LiveAdapter(other).snapshot(), pad(ROWS)
    kept = [batch["attention_mask"].bool()]
    X = oracles.module_inputs(other if run_with_factors else model, "default", [batch], kept)
    found = collect(model, [batch], factors=factors, run_with_factors=run_with_factors)
    assert_sums(found, model, X, factors)
    assert found.record["calibration_model"] == ("reference" if run_with_factors else "tuned")


# Other architectures


def with_lora(model: nn.Module, task: str, targets: Any) -> PeftModel:
    lora = get_peft_model(model.eval(), LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type=task))
    randomise_lora(lora, "default", seed=2)
    return lora.eval()


def t5() -> PeftModel:
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    return with_lora(T5ForConditionalGeneration(config), "SEQ_2_SEQ_LM", ["q", "k", "v", "o", "wi", "wo"])


def bart() -> PeftModel:
    config = BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    return with_lora(BartForConditionalGeneration(config), "SEQ_2_SEQ_LM", targets)


def bert(*targets: str) -> PeftModel:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    torch.manual_seed(0)
    return with_lora(BertForSequenceClassification(config), "SEQ_CLS", list(targets))


def opt() -> PeftModel:
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    torch.manual_seed(0)
    return with_lora(OPTForCausalLM(config), "CAUSAL_LM", ["q_proj", "fc1", "fc2"])


def seq2seq_batch(rows: list[Row], *, encoder: int | None = None, decoder: int | None = None) -> dict[str, Tensor]:
    """Prompts for the encoder and answers as labels, padded to the given lengths or to the longest."""
    prompts, answers = ([list(row[i]) for row in rows] for i in (0, 1))
    encoder, decoder = encoder or max(map(len, prompts)), decoder or max(map(len, answers))
    return {
        "input_ids": torch.tensor([p + [0] * (encoder - len(p)) for p in prompts]),
        "attention_mask": torch.tensor([[1] * len(p) + [0] * (encoder - len(p)) for p in prompts]),
        "labels": torch.tensor([a + [-100] * (decoder - len(a)) for a in answers]),
    }


CLASSIFIED = {**pad(ROWS), "labels": torch.arange(len(ROWS)) % 3}
LENGTHS = {"other-lengths": (None, None), "equal-lengths": (6, 6), "longer-decoder": (5, 8)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_and_decoder_modules_count_their_own_tokens(
    make: Callable[[], PeftModel], lengths: tuple[int | None, int | None]
) -> None:
    model = make()
    X = unpadded_inputs(model, [seq2seq_batch([row]) for row in ROWS])
    assert len({len(x) for x in X.values()}) == 2
    batches = [seq2seq_batch(rows, encoder=lengths[0], decoder=lengths[1]) for rows in (ROWS[:4], ROWS[4:])]
    assert_sums(collect(model, batches, codes=True, moments=True), model, X)


@pytest.mark.parametrize("length", [5, 7], ids=["other-length", "same-length"])
@pytest.mark.parametrize("mask", ["none", "decoder_attention_mask"])
def test_a_decoder_without_labels_counts_its_given_tokens(length: int, mask: str) -> None:
    model, generator = t5(), torch.Generator().manual_seed(0)
    ids, start = (torch.randint(3, 64, (2, n), generator=generator) for n in (7, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": start}
    kept = torch.ones_like(start)
    if mask != "none":
        kept[0, 3:] = 0
        batch[mask] = kept
    assert collect(model, [batch])["decoder.block.0.layer.0.SelfAttention.q"].tokens == int(kept.sum())


@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_decoders_have_no_block_order(make: Callable[[], PeftModel]) -> None:
    with pytest.raises(UnsupportedAdapterError, match="encoder-decoder"):
        collect_sequential(make(), [seq2seq_batch(ROWS)], factors=None, config=NLSRConfig(), progress=False)


def test_an_encoder_counts_attended_tokens_whatever_its_labels() -> None:
    model = bert("query", "value", "intermediate.dense")
    X = unpadded_inputs(model, [{**pad([row]), "labels": torch.tensor([0])} for row in ROWS])
    assert_sums(collect(model, [CLASSIFIED]), model, X)


def test_class_labels_have_no_answer_to_differentiate() -> None:
    with pytest.raises(CalibrationError, match="need labels for each token"):
        collect(bert("query"), [CLASSIFIED], gradients="snip")


def test_a_module_that_sees_something_else_than_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"pooler.dense received 7 rows"):
        collect(bert("query", "pooler.dense"), [CLASSIFIED])


@pytest.mark.parametrize("gradients", [None, "snip"], ids=["no-gradients", "snip"])
def test_a_model_that_flattens_batch_and_tokens_is_measured_alike(gradients: str | None) -> None:
    model = opt()
    whole, single = (collect(model, batches, gradients=gradients) for batches in ([pad(ROWS)], SPLITS["one-by-one"]))
    assert_same_statistics(whole, single)


# Gradients


@pytest.mark.parametrize("side", ["right", "left"])
def test_snip_sums_equal_a_loop_over_single_samples(make_pico_lora: MakeLora, side: str) -> None:
    model = make_pico_lora()
    found = collect(model, [pad(FEW[:3], side=side, extra=2), pad(FEW[3:], side=side)], gradients="snip")
    for name, (grad_A, grad_B) in oracles.snip_sums(model, "default", FEW).items():
        assert gap(found[name].grad_A, grad_A) < SINGLE and gap(found[name].grad_B, grad_B) < SINGLE


@pytest.mark.parametrize("side", ["right", "left"])
def test_preference_snip_sums_equal_a_loop_over_single_pairs(make_pico_lora: MakeLora, side: str) -> None:
    model = make_pico_lora()
    parts = [
        {"chosen": pad(FEW[part], side=side, extra=2), "rejected": pad(REJECTED[part], side=side)}
        for part in (slice(3), slice(3, None))
    ]
    found = collect(model, parts, gradients="preference_snip")
    for name, (grad_A, grad_B) in oracles.preference_snip_sums(model, "default", FEW, REJECTED).items():
        assert gap(found[name].grad_A, grad_A) < SINGLE and gap(found[name].grad_B, grad_B) < SINGLE


def test_preference_statistics_are_those_of_the_chosen_answers(make_pico_lora: MakeLora) -> None:
    model, batch = make_pico_lora(), {"chosen": pad(FEW), "rejected": pad(REJECTED)}
    found, expected = collect(model, [batch], gradients="preference_snip"), collect(model, [pad(FEW)])
    for name, mine in found.items():
        assert gap(mine.z_gram, expected[name].z_gram) < SINGLE


def test_seq2seq_preferences_of_any_lengths_equal_a_loop_over_pairs() -> None:
    pairs = [
        {"chosen": seq2seq_batch([g]), "rejected": seq2seq_batch([b])} for g, b in zip(FEW, REJECTED, strict=True)
    ]
    whole = {"chosen": seq2seq_batch(FEW, decoder=9), "rejected": seq2seq_batch(REJECTED)}
    model = t5()
    found, expected = (collect(model, batches, gradients="preference_snip") for batches in ([whole], pairs))
    assert_same_statistics(found, expected)


# The release's order


SEQUENTIAL = {
    "paper-rank": {"low_rank_rule": "paper"},
    "released-rank": {"low_rank_rule": "released"},
    "response-tokens": {"calibration_tokens": "response"},
}


@pytest.mark.parametrize("knobs", SEQUENTIAL.values(), ids=SEQUENTIAL)
def test_sequential_low_rank_factors_and_masks_equal_the_released_loop(
    make_pico_lora: MakeLora, knobs: dict[str, Any]
) -> None:
    model, tuned = (
        make_pico_lora(target_modules="all-linear", r=5),
        make_pico_lora(target_modules="all-linear", r=5, seed=4),
    )
    config = NLSRConfig(sequential=True, **knobs)
    batches = [pad(ROWS[:4]), pad(ROWS[4:], side="left")]
    kept = [b["attention_mask"] if config.calibration_tokens == "all" else b["labels"] != -100 for b in batches]
    expected = oracles.released_reduce_sequential(model, batches, kept, rank_kept(5, config))
    factors = LiveAdapter(model).snapshot()
    found = collect_sequential(tuned, batches, factors=factors, config=config, progress=False)
    for name, update in factors.items():
        reduced = low_rank_factors(update, found[name].z_gram, rank_kept(5, config))
        masks = safety_masks(update, found[name], config, generator=torch.Generator())
        cut = oracles.released_threshold_tensor if config.low_rank_rule == "released" else oracles.top_k_tensor
        for mine, mask, theirs in zip(reduced, masks, expected[name], strict=True):
            assert gap(mine, theirs) < SINGLE
            assert torch.equal(mask, cut(theirs.abs(), config.sparsity))


def test_sequential_wanda_measures_each_block_behind_masked_ones(make_pico_lora: MakeLora) -> None:
    model, batch, config = make_pico_lora(), pad(ROWS), NLSRConfig(score="wanda", sparsity=0.5, sequential=True)
    kept = [batch["attention_mask"].bool()]
    found = collect_sequential(model, [batch], factors=None, config=config, progress=False)
    X = oracles.module_inputs(model, "default", [batch], kept)
    pruned = oracles.float64_copy(model, "default")
    for name, layer in lora_layers(pruned, "default").items():
        if ".0." in name:
            A, B, _ = oracles.factors(layer, "default")
            of_A, of_B = oracles.wanda_scores(A, B, X[name])
            masks = oracles.top_k_tensor(of_A, 0.5), oracles.top_k_tensor(of_B, 0.5)
            oracles.write_factors(layer, "default", A * masks[0], B * masks[1])
    behind = oracles.module_inputs(pruned, "default", [batch], kept)
    assert_sums(found, model, {name: (X if ".0." in name else behind)[name] for name in X})


def test_the_first_block_of_the_sequential_order_is_that_of_a_plain_pass(make_pico_lora: MakeLora) -> None:
    model, batch = make_pico_lora(), pad(ROWS)
    one_by_one = collect_sequential(model, [batch], factors=None, config=NLSRConfig(), progress=False)
    at_once = collect(model, [batch])
    for name in at_once:
        assert (gap(one_by_one[name].z_gram, at_once[name].z_gram) < SINGLE) == (".0." in name)


@pytest.mark.parametrize("score", ["snip", "preference_snip", "magnitude", "random"])
def test_other_scores_have_no_sequential_order(make_pico_lora: MakeLora, score: str) -> None:
    with pytest.raises(ValueError, match=f"got '{score}'"):
        collect_sequential(make_pico_lora(), [pad(ROWS)], factors=None, config=NLSRConfig(score=score))


# Sketches


def spread(decay: float, *, tokens: int = 200, d_in: int = 24) -> Tensor:
    X = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(3)).double()
    return X * decay ** torch.arange(d_in).double()


def sketch(X: Tensor, rows: int, *, chunk: int) -> FrequentDirections:
    made = FrequentDirections(X.shape[1], rows)
    for part in X.split(chunk):
        made.add(part)
    return made


@pytest.mark.parametrize("chunk", [1, 7, 200])
@pytest.mark.parametrize("rows", [2, 8, 20])
@pytest.mark.parametrize("decay", [1.0, 0.7], ids=["flat", "decaying"])
def test_a_sketch_lies_below_the_moment_by_no_more_than_its_bound(decay: float, rows: int, chunk: int) -> None:
    X = spread(decay)
    moment = sketch(X, rows, chunk=chunk).moment()
    assert moment.rows is not None and len(moment.rows) <= rows
    trace = float(X.square().sum())
    missing = torch.linalg.eigvalsh(X.T @ X - moment.rows.T @ moment.rows) / trace
    assert float(missing[0]) > -1e-12
    assert float(missing[-1]) <= moment.error + 1e-12
    assert moment.error <= 1.0 / rows


def test_a_sketch_never_holds_more_than_twice_its_rows() -> None:
    made = FrequentDirections(24, 4)
    for part in spread(1.0).split(3):
        made.add(part)
        assert len(made.buffer) <= 8


def test_a_sketch_with_as_many_rows_as_inputs_loses_nothing() -> None:
    X = spread(0.9)
    moment = sketch(X, X.shape[1], chunk=13).moment()
    assert moment.rows is not None
    assert gap(moment.rows.T @ moment.rows, X.T @ X) < 1e-12
    assert moment.error < 1e-12


def test_wide_modules_are_sketched_and_narrow_ones_are_not(make_pico_lora: MakeLora) -> None:
    model, batch = make_pico_lora(), pad(random_rows(40, seed=1))
    X = oracles.module_inputs(model, "default", [batch], [batch["attention_mask"].bool()])[DOWN]
    found = collect(model, [batch], moments=True, sketch_above=32, sketch_rows=16)
    narrow, wide = found["model.layers.0.self_attn.q_proj"].moment, found[DOWN].moment
    assert narrow is not None and narrow.full is not None and narrow.error == 0.0
    assert wide is not None and wide.rows is not None and 0.0 < wide.error < 1.0
    missing = torch.linalg.eigvalsh(X.T @ X - wide.rows.T @ wide.rows)
    assert float(missing[-1]) <= wide.error * float(X.square().sum()) * (1 + SINGLE)


# Files


def test_saved_statistics_come_back_bit_for_bit(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    found = collect(make_pico_lora(), [pad(ROWS)], gradients="snip", moments=True, sketch_above=32, sketch_rows=8)
    found.save(tmp_path / "new" / "folder")
    again = SafetyStatistics.load(tmp_path / "new" / "folder")
    assert list(again) == list(found) and again.record == found.record
    for name, mine in found.items():
        theirs = again[name]
        assert theirs.tokens == mine.tokens
        for kind in ("z_gram", "x_square", "grad_A", "grad_B"):
            assert same_bits(getattr(theirs, kind), getattr(mine, kind))
        assert mine.moment is not None and theirs.moment is not None
        assert theirs.moment.error == mine.moment.error
        assert same_bits(theirs.moment.full, mine.moment.full) and same_bits(theirs.moment.rows, mine.moment.rows)


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no-folder": shutil.rmtree,
    "no-tensors": lambda folder: (folder / TENSORS_NAME).unlink(),
    "no-modules": lambda folder: edit_record(folder, lambda record: record.pop("modules")),
    "modules-are-a-list": lambda folder: edit_record(folder, lambda record: record.update(modules=["m"])),
    "a-module-without-tokens": lambda folder: edit_record(folder, lambda r: next(iter(r["modules"].values())).clear()),
    "a-module-without-tensors": lambda folder: edit_record(folder, lambda r: r["modules"].update(m={"tokens": 1})),
}


def edit_record(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / RECORD_NAME).read_text())
    edit(record)
    (folder / RECORD_NAME).write_text(json.dumps(record))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_statistics_are_an_error_of_the_family(make_pico_lora: MakeLora, tmp_path: Path, damage: str) -> None:
    collect(make_pico_lora(), [pad(ROWS)]).save(tmp_path / "statistics")
    DAMAGES[damage](tmp_path / "statistics")
    with pytest.raises(PeftNLSRError, match=r"statistics.*collect"):
        SafetyStatistics.load(tmp_path / "statistics")


def test_statistics_of_another_schema_are_refused(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    found = collect(make_pico_lora(), [pad(ROWS)])
    SafetyStatistics(found, {**found.record, "schema_version": 99}).save(tmp_path)
    with pytest.raises(CorruptFileError, match="schema 99"):
        SafetyStatistics.load(tmp_path)


MISFITS: dict[str, tuple[Callable[[dict[str, LowRank]], dict[str, LowRank]], str]] = {
    "module-without-statistics": (lambda u: u | {"x": u[DOWN]}, "lack 1 modules, first x"),
    "another-rank": (lambda u: u | {DOWN: LowRank(*random_factors(32, 48, 6, seed=0))}, "rank 4 .* rank 6"),
    "another-width": (lambda u: u | {DOWN: LowRank(*random_factors(32, 20, 4, seed=0))}, "48 inputs.* and 20"),
}


@pytest.mark.parametrize(("spoil", "words"), MISFITS.values(), ids=MISFITS)
def test_statistics_that_do_not_fit_a_reference_say_so(make_pico_lora: MakeLora, spoil: Any, words: str) -> None:
    model = make_pico_lora()
    found = collect(model, [pad(ROWS)])
    found.require_modules(LiveAdapter(model).snapshot())
    with pytest.raises(IncompatibleError, match=words):
        found.require_modules(spoil(LiveAdapter(model).snapshot()))


# What cannot be measured


def without(batch: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in batch.items() if key not in keys}


def unanswered(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


PAIR = {"chosen": pad(ROWS), "rejected": without(pad(ROWS), "labels")}
UNUSABLE: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "no-batches": ([], {}, "empty"),
    "no-answer-tokens": ([unanswered(pad(ROWS))], {"tokens": "response"}, "saw no calibration tokens"),
    "response-without-labels": ([without(pad(ROWS), "labels")], {"tokens": "response"}, "needs labels"),
    "snip-without-labels": ([without(pad(ROWS), "labels")], {"gradients": "snip"}, "need labels"),
    "preferences-without-pairs": ([pad(ROWS)], {"gradients": "preference_snip"}, "'chosen'.*found the keys attention"),
    "rejected-without-labels": ([PAIR], {"gradients": "preference_snip"}, r"lack \['labels'\]"),
}


@pytest.mark.parametrize(("batches", "settings", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_data_that_cannot_be_used_are_refused(
    make_pico_lora: MakeLora, batches: list[Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(CalibrationError, match=words):
        collect(make_pico_lora(), batches, **settings)


@pytest.mark.parametrize("gradients", [None, "snip"], ids=["no-gradients", "snip"])
def test_a_module_that_never_runs_is_an_error(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch, gradients: str | None
) -> None:
    model = make_pico_lora()
    monkeypatch.setattr(model.get_submodule("base_model.model.model.layers.1.mlp"), "forward", lambda x: x)
    with pytest.raises(CalibrationError, match=f"{DOWN} saw no calibration tokens"):
        collect(model, [pad(ROWS)], gradients=gradients)


def test_an_unknown_kind_of_gradients_lists_the_choices(make_pico_lora: MakeLora) -> None:
    with pytest.raises(ValueError, match="snip, preference_snip"):
        collect(make_pico_lora(), [pad(ROWS)], gradients="grad")


def sequential(model: Any, batches: Any, **settings: Any) -> SafetyStatistics:
    return collect_sequential(model, batches, factors=None, config=NLSRConfig(), progress=False, **settings)


def test_no_batches_are_an_error_in_the_sequential_order_too(make_pico_lora: MakeLora) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        sequential(make_pico_lora(), [])


@pytest.mark.parametrize("measure", [collect, sequential])
def test_the_model_must_compute_with_the_adapter_that_is_measured(make_pico_lora: MakeLora, measure: Any) -> None:
    model = make_pico_lora()
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(IncompatibleError, match=r"\['default'\] in .*expected 'other' alone"):
        measure(model, [pad(ROWS)], adapter_name="other")
    with model.disable_adapter(), pytest.raises(IncompatibleError, match=r"adapters \[\] in"):
        measure(model, [pad(ROWS)], adapter_name="default")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(IncompatibleError, match=r"\['default', 'other'\] in"):
        measure(model, [pad(ROWS)], adapter_name="default")


# The model afterwards


def interrupted(error: type[BaseException]) -> Iterator[dict[str, Tensor]]:
    yield pad(ROWS)
    raise error


MEASURES: dict[str, Callable[[Any, Any], Any]] = {
    "plain": lambda model, batches: collect(model, batches, codes=True, moments=True),
    "snip": lambda model, batches: collect(model, batches, gradients="snip"),
    "preference-snip": lambda model, batches: collect(
        model, ({"chosen": b, "rejected": b} for b in batches), gradients="preference_snip"
    ),
    "run-with-factors": lambda model, batches: collect(
        model, batches, factors=LiveAdapter(model).snapshot(), run_with_factors=True
    ),
    "sequential": sequential,
}


def oddly_set_up(make_pico_lora: MakeLora) -> PeftModel:
    """A model in training mode whose flags are not those that PEFT gives."""
    model = make_pico_lora(lora_dropout=0.5).train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    layer = lora_layers(model, "default")[DOWN]
    layer.lora_A["default"].weight.requires_grad_(False)
    model.get_submodule("base_model.model.lm_head").weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_measuring_leaves_the_model_as_it_was(make_pico_lora: MakeLora, measure: Callable[[Any, Any], Any]) -> None:
    model = oddly_set_up(make_pico_lora)
    before = state_of(model)
    measure(model, [pad(ROWS)])
    assert_same_state(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_failure_between_batches_leaves_the_model_as_it_was(
    make_pico_lora: MakeLora, measure: Callable[[Any, Any], Any], error: type[BaseException]
) -> None:
    model = oddly_set_up(make_pico_lora)
    before = state_of(model)
    with pytest.raises(error):
        measure(model, interrupted(error))
    assert_same_state(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_failure_in_the_middle_of_a_pass_leaves_the_model_as_it_was(
    make_pico_lora: MakeLora, measure: Callable[[Any, Any], Any], error: type[BaseException]
) -> None:
    model = oddly_set_up(make_pico_lora)
    calls = iter([None, error()])

    def fail(*_: Any) -> None:
        problem = next(calls, None)
        if problem is not None:
            raise problem

    lora_layers(model, "default")[DOWN].base_layer.register_forward_hook(fail)
    before = state_of(model)
    with pytest.raises(error):
        measure(model, [pad(ROWS), pad(ROWS)])
    assert_same_state(model, before)
