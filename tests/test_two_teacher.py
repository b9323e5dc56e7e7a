"""The two-teacher form equals its dense oracle on whole models of many kinds, and leaves the model as it was.

Tolerances: the engine sums float32 products, and the solution divides that rounding by the smallest direction of
`M + eps I`, which the ridge bounds from below. So the relative error grows as 1 / ridge; measured, it is 2e-7 / ridge.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from conftest import randomise_lora
from oracles import Groups, Row, assert_same_state, decision_weights, gap, lora_layers, pad, random_rows, state_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_nlsr import two_teacher
from peft_nlsr.blocks import Factors, is_added_last
from peft_nlsr.config import NLSRConfig
from peft_nlsr.errors import CalibrationError, IncompatibleError, UnsupportedAdapterError
from peft_nlsr.examples import Example
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.lowrank import LowRank
from peft_nlsr.two_teacher import TwoTeacherSolution, solve_two_teacher

MakeLora = Callable[..., PeftModel]
DOWN = "model.layers.1.mlp.down_proj"
SAFETY, UTILITY = random_rows(9, seed=1), random_rows(7, seed=2)
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(autouse=True)
def _batches_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples this short would all share one batch."""
    monkeypatch.setattr("peft_nlsr.examples.SHORT", 1)


def tolerance(ridge: float) -> float:
    return 1e-6 / ridge


def settings(**changes: Any) -> NLSRConfig:
    return NLSRConfig(**{"ridge": 0.1, "utility_weight": 0.5, "nlsr_batch_size": 4, **changes})


def examples(rows: list[Row], refusals: Sequence[bool | None]) -> list[Example]:
    return [
        Example(tuple(prompt), tuple(answer), index, refusal)
        for index, ((prompt, answer), refusal) in enumerate(zip(rows, refusals, strict=True))
    ]


def solve(
    model: Any,
    config: NLSRConfig,
    *,
    safety: list[Row] = SAFETY,
    utility: list[Row] = UTILITY,
    refusals: Sequence[bool | None] | None = None,
    safe_teacher: Factors = None,
    work_dir: Path | None = None,
    **options: Any,
) -> TwoTeacherSolution:
    return solve_two_teacher(
        LiveAdapter(model, **options),
        safety=examples(safety, [True] * len(safety) if refusals is None else refusals),
        utility=examples(utility, [False] * len(utility)),
        safe_teacher=safe_teacher,
        config=config,
        progress=False,
        work_dir=work_dir,
    )


def oracle(model: PeftModel, config: NLSRConfig, **options: Any) -> dict[str, Tensor]:
    batches = [{k: t for k, t in pad(rows).items() if k != "labels"} for rows in (SAFETY, UTILITY)]
    weights = [decision_weights(rows, config.decision_weight) for rows in (SAFETY, UTILITY)]
    return oracles.two_teacher_model_oracle(
        model, "default", *batches, weights, config.utility_weight, config.ridge, **options
    )


def assert_solves(solution: TwoTeacherSolution, expected: dict[str, Tensor], within: float) -> None:
    assert set(solution.updates) == set(solution.errors) == set(expected)
    for name, update in solution.updates.items():
        assert gap(update.scale * update.B.double() @ update.A.double(), expected[name]) < within, name


# Architectures


def with_lora(model: nn.Module, targets: Any, **options: Any) -> PeftModel:
    """LoRA on the targets; biases, which transformers starts at zero, are drawn too."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
    lora = get_peft_model(model, config)
    randomise_lora(lora, "default", seed=4)
    return lora.eval()


def gpt2() -> PeftModel:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return with_lora(GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)


def neox() -> PeftModel:
    config = GPTNeoXConfig(**SIZES, intermediate_size=24, max_position_embeddings=32, use_parallel_residual=True)
    return with_lora(
        GPTNeoXForCausalLM(config), ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"]
    )


def phi() -> PeftModel:
    config = PhiConfig(**SIZES, intermediate_size=24, max_position_embeddings=32)
    return with_lora(PhiForCausalLM(config), ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"])


def qwen2() -> PeftModel:
    config = Qwen2Config(**SIZES, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=32)
    return with_lora(Qwen2ForCausalLM(config), "all-linear")


def opt() -> PeftModel:
    config = OPTConfig(**SIZES, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16)
    return with_lora(OPTForCausalLM(config), ["q_proj", "v_proj", "out_proj", "fc1", "fc2"])


def gemma2() -> PeftModel:
    """What its modules write passes a norm before it is added, so that none of them is added last."""
    config = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=32)
    return with_lora(Gemma2ForCausalLM(config), "all-linear")


MODELS: dict[str, tuple[Callable[[], PeftModel], Groups, str | None]] = {
    "gpt2-fused-conv1d": (gpt2, [["c_attn"], ["attn.c_proj"], ["c_fc"], ["mlp.c_proj"]], "mlp.c_proj"),
    "neox-fused-parallel": (
        neox,
        [["query_key_value"], ["attention.dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
        "dense_4h_to_h",
    ),
    "phi-parallel-shared-norm": (phi, [["q_proj", "k_proj", "v_proj"], ["dense"], ["fc1"], ["fc2"]], "fc2"),
    "qwen2-qkv-biases": (qwen2, oracles.GROUPS, "down_proj"),
    "opt-flattened-tokens": (opt, [["q_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]], "fc2"),
    "gemma2-norm-behind-the-output": (gemma2, oracles.GROUPS, None),
}


@pytest.mark.parametrize(("make", "groups", "corrects"), MODELS.values(), ids=MODELS)
def test_whole_models_equal_the_dense_oracle(
    make: Callable[[], PeftModel], groups: Groups, corrects: str | None
) -> None:
    torch.manual_seed(0)
    model, config = make().double(), settings()
    before = state_of(model)
    solution = solve(model, config)
    assert_same_state(model, before)
    assert_solves(solution, oracle(model, config, groups=groups, corrects=corrects), tolerance(config.ridge))


def test_drift_is_left_uncorrected_where_asked(make_pico_lora: MakeLora) -> None:
    model, config = make_pico_lora().double(), settings(correct_drift=False)
    left = solve(model, config)
    assert_solves(left, oracle(model, config, corrects=None), tolerance(config.ridge))
    first, second = (dense(found)[DOWN] for found in (left, solve(model, settings())))
    assert gap(first, second) > 0.01


@pytest.mark.parametrize("refusals", [[i % 3 != 1 for i in range(9)], [False] * 9], ids=["some", "none"])
def test_only_where_the_safe_answer_is_a_refusal_drift_is_corrected(
    make_pico_lora: MakeLora, refusals: list[bool]
) -> None:
    model, config = make_pico_lora().double(), settings(lookalike_weight=1.0)
    expected = oracle(model, config, refusals=torch.tensor(refusals))
    assert_solves(solve(model, config, refusals=refusals), expected, tolerance(config.ridge))


@pytest.mark.parametrize("weight", [0.01, 3.0])
@pytest.mark.parametrize("refusals", [[i % 3 != 1 for i in range(9)], [False] * 9], ids=["some", "all"])
def test_safety_data_that_are_answered_have_their_own_weight(
    make_pico_lora: MakeLora, refusals: list[bool], weight: float
) -> None:
    model, config = make_pico_lora().double(), settings(lookalike_weight=weight)
    expected = oracle(model, config, refusals=torch.tensor(refusals), lookalike_weight=weight)
    assert_solves(solve(model, config, refusals=refusals), expected, tolerance(config.ridge))


def test_safety_data_of_which_nothing_is_known_weigh_as_much_as_refusals(make_pico_lora: MakeLora) -> None:
    model, config = make_pico_lora().double(), settings(correct_drift=False)
    unknown = solve(model, config, refusals=[None if i % 3 == 1 else True for i in range(9)])
    assert_solves(unknown, oracle(model, config, corrects=None), tolerance(config.ridge))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_added_last_is_found_in_any_precision(make_pico_lora: MakeLora, dtype: torch.dtype) -> None:
    model = make_pico_lora().to(dtype)
    block = model.base_model.model.model.layers[0]
    for weight in block.mlp.parameters():
        weight.data *= 20  # they start near 0, and then hardly answer to what o_proj writes
    states = 30 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = model.base_model.model.model.rotary_emb(states, torch.arange(5)[None])
    arguments: Any = ((), {"position_embeddings": positions})
    added = {
        name: is_added_last(block, module, states, arguments, torch.ones(2, 5, dtype=torch.bool))
        for name, module in block.named_modules()
        if name.endswith("_proj")
    }
    assert [name for name, last in added.items() if last] == ["mlp.down_proj"]


CONFIGS: dict[str, dict[str, Any]] = {
    "default-ridge": {"ridge": 1e-3},
    "large-ridge": {"ridge": 10.0},
    "lambda-3": {"utility_weight": 3.0},
    "no-decision-weight": {"decision_weight": 1.0},
    "decision-only-half-ignored": {"decision_weight": 0.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_llama_equals_the_dense_oracle(
    make_pico_lora: MakeLora, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    model, config = (
        make_pico_lora(target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]).to(dtype),
        settings(**changes),
    )
    assert_solves(solve(model, config), oracle(model, config), max(1e-5, tolerance(config.ridge)))


@pytest.mark.parametrize("solver", ["moment", "dual", "iterative"])
def test_every_solver_follows_the_dense_oracle_through_a_model(make_pico_lora: MakeLora, solver: str) -> None:
    model, config = make_pico_lora(target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]), settings(solver=solver)
    solution = solve(model, config)
    assert_solves(solution, oracle(model, config), 0.02)
    assert 0.0 <= max(solution.solver_errors.values()) < 0.01
    assert solution.estimate["solvers"] == {"32": [solver], "48": [solver]} and not solution.notes


def test_small_modules_are_solved_in_full_by_default(make_pico_lora: MakeLora) -> None:
    by_default, full = (solve(make_pico_lora(), settings(solver=solver)) for solver in ("auto", "full"))
    for name, update in by_default.updates.items():
        assert torch.equal(update.A, full.updates[name].A) and torch.equal(update.B, full.updates[name].B)
    assert set(by_default.solver_errors.values()) == {0.0}


def test_drawn_tokens_are_reported(make_pico_lora: MakeLora) -> None:
    solution = solve(make_pico_lora(), settings(solver="moment", max_tokens=40))
    counted = solution.estimate["counted"]
    assert solution.estimate["kept"] == 40 < counted
    assert solution.notes[0].startswith(f"40 of {counted} calibration tokens were drawn")
    assert not solve(make_pico_lora(), settings(max_tokens=40)).notes


def test_a_solver_that_is_off_by_more_than_one_percent_is_reported(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_nlsr.two_teacher.LARGEST_ERROR", 1e-9)
    notes = solve(make_pico_lora(), settings(solver="iterative")).notes
    assert any("the solver is off by more than" in note and "q_proj" in note for note in notes)


class Interrupted:
    """Stands in for the solution of a group: interrupts the run after some groups."""

    def __init__(self, after: int = 0) -> None:
        self.left, self.real = after, two_teacher._solve_group

    def __call__(self, *args: Any) -> Any:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.real(*args)


def test_the_cost_is_logged_before_the_first_block(
    make_pico_lora: MakeLora, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_nlsr.two_teacher._solve_group", Interrupted())
    with caplog.at_level("INFO", logger="peft_nlsr.two_teacher"), pytest.raises(KeyboardInterrupt):
        solve(make_pico_lora(), settings())
    assert "FLOP in passes of the model" in caplog.text and "full for 32 inputs, full for 48 inputs" in caplog.text


@pytest.mark.parametrize("solver", ["full", "iterative"])
def test_an_interrupted_run_goes_on_with_the_same_bits(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, solver: str
) -> None:
    folder, config = tmp_path / "run", settings(solver=solver)
    whole = solve(make_pico_lora(), config)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("peft_nlsr.two_teacher._solve_group", Interrupted(after=3))  # in the second block
        solve(make_pico_lora(), config, work_dir=folder)
    assert sorted(p.name for p in folder.iterdir()) == ["block_0000.safetensors", "two_teacher.json"]
    groups_left = Interrupted(after=2)
    monkeypatch.setattr("peft_nlsr.two_teacher._solve_group", groups_left)
    resumed = solve(make_pico_lora(), config, work_dir=folder)
    assert groups_left.left == 0 and not folder.exists()
    assert (resumed.errors, resumed.solver_errors) == (whole.errors, whole.solver_errors)
    for name, update in whole.updates.items():
        found = resumed.updates[name]
        assert torch.equal(found.A, update.A) and torch.equal(found.B, update.B) and found.scale == update.scale


OTHER_INPUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "config": ({}, {"ridge": 0.2}, {}),
    "adapter": ({"seed": 1}, {}, {}),
    "data": ({}, {}, {"utility": UTILITY[:-1]}),
    "safe_teacher": ({}, {}, {"safe_teacher": {}}),
}


@pytest.mark.parametrize("differs", OTHER_INPUTS)
def test_a_folder_of_another_run_is_refused_and_left_alone(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, differs: str
) -> None:
    lora, changes, data = OTHER_INPUTS[differs]
    monkeypatch.setattr("peft_nlsr.two_teacher._solve_group", Interrupted(after=2))
    with pytest.raises(KeyboardInterrupt):
        solve(make_pico_lora(), settings(), work_dir=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(IncompatibleError, match=rf"differs in .*{differs}.*another work_dir"):
        solve(make_pico_lora(**lora), settings(**changes), work_dir=tmp_path, **data)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_with_other_files_is_refused(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(IncompatibleError, match="not a folder of an unfinished run"):
        solve(make_pico_lora(), settings(), work_dir=tmp_path)


def quantised(pico_llama: LlamaForCausalLM, folder: Path) -> tuple[PeftModel, PeftModel]:
    """A model on a 4-bit base, and the same on a plain base with the weights that the 4-bit base computes with."""
    pico_llama.save_pretrained(folder)
    four_bit = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    targets = ["q_proj", "v_proj", "down_proj"]
    for name, layer in four_bit.named_modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = (
                False  # that kernel repacks the weights in place, and computes in bfloat16
            )
            unit = torch.eye(layer.in_features)
            pico_llama.get_submodule(name).weight.data = layer(unit).T.detach().clone()
    return with_lora(four_bit, targets), with_lora(pico_llama, targets)


def test_a_4_bit_base_equals_the_dense_oracle_on_its_dequantised_weights(
    pico_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    four_bit, plain = quantised(pico_llama, tmp_path)
    config, before = settings(), state_of(four_bit)
    solution = solve(four_bit, config)
    assert_same_state(four_bit, before)
    assert_solves(solution, oracle(plain, config), tolerance(config.ridge))


# Teachers


@pytest.mark.parametrize("rank", [4, 7, 1])
def test_another_safe_teacher_of_any_rank_is_followed(make_pico_lora: MakeLora, rank: int) -> None:
    model, safe, config = make_pico_lora().double(), make_pico_lora(seed=5, r=rank, lora_alpha=3), settings()
    solution = solve(model, config, safe_teacher=LiveAdapter(safe).snapshot())
    assert_solves(solution, oracle(model, config, safe=safe), tolerance(config.ridge))


class ReadOnce(Mapping[str, LowRank]):
    """Updates that cannot be read twice; those of a file would be read from the disk again."""

    def __init__(self, updates: dict[str, LowRank]) -> None:
        self.unread, self.names = dict(updates), list(updates)

    def __getitem__(self, name: str) -> LowRank:
        return self.unread.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_a_safe_teacher_is_read_once(make_pico_lora: MakeLora) -> None:
    safe = LiveAdapter(make_pico_lora(seed=5)).snapshot()
    expected = solve(make_pico_lora(), settings(), safe_teacher=safe)
    assert_solves(solve(make_pico_lora(), settings(), safe_teacher=ReadOnce(safe)), dense(expected), 1e-6)


@pytest.mark.parametrize("make", [gpt2, neox, qwen2])
def test_two_teachers_that_agree_change_nothing(make: Callable[[], PeftModel]) -> None:
    model = make()
    tuned = LiveAdapter(model).snapshot()
    solution = solve(model, settings(), safe_teacher=tuned)
    assert_solves(solution, {n: u.scale * u.B.double() @ u.A.double() for n, u in tuned.items()}, 1e-4)
    assert max(solution.errors.values()) < 1e-4


def test_no_utility_data_is_a_utility_weight_of_zero(make_pico_lora: MakeLora) -> None:
    model, config = make_pico_lora().double(), settings(utility_weight=0.0)
    expected = oracle(model, config)
    assert_solves(solve(model, config), expected, tolerance(config.ridge))
    assert_solves(solve(model, settings(utility_weight=2.0), utility=[]), expected, tolerance(config.ridge))


def test_no_safety_data_is_an_error(make_pico_lora: MakeLora) -> None:
    with pytest.raises(CalibrationError, match="needs safety examples"):
        solve(make_pico_lora(), settings(), safety=[])


# How the data come


def dense(solution: TwoTeacherSolution) -> dict[str, Tensor]:
    return {name: u.scale * u.B.double() @ u.A.double() for name, u in solution.updates.items()}


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "one-by-one": {"size": 1},
    "all-at-once": {"size": 100},
    "another-order": {"size": 4, "safety": SAFETY[::-1], "utility": UTILITY[::-1]},
    "every-row-twice": {"size": 4, "safety": SAFETY * 2, "utility": UTILITY * 2},
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_order_batches_and_repetition_do_not_matter(make_pico_lora: MakeLora, arrangement: dict[str, Any]) -> None:
    model, config = make_pico_lora(), settings()
    rows = {key: value for key, value in arrangement.items() if key != "size"}
    found = solve(model, config.replace(nlsr_batch_size=arrangement["size"]), **rows)
    assert_solves(found, dense(solve(model, config)), tolerance(config.ridge))


def test_blocks_without_lora_only_pass_the_data_on(make_pico_lora: MakeLora) -> None:
    model, config = make_pico_lora(layers_to_transform=[1]), settings()
    assert_solves(solve(model, config), oracle(model, config), tolerance(config.ridge))


def test_modules_outside_the_blocks_are_listed_and_left_alone(make_pico_lora: MakeLora) -> None:
    solution = solve(make_pico_lora(target_modules=["q_proj", "lm_head"]), settings())
    assert solution.left_alone == ("lm_head",)
    assert set(solution.updates) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


# Refusals


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(target_modules=["q"]))
    with pytest.raises(UnsupportedAdapterError, match="encoder-decoder"):
        solve(model, settings())


def test_a_model_without_lora_in_a_list_of_blocks_is_refused(make_pico_lora: MakeLora) -> None:
    with pytest.raises(UnsupportedAdapterError, match="no list of blocks"):
        solve(make_pico_lora(target_modules=["lm_head"]), settings())


def test_blocks_that_exchange_more_than_their_hidden_state_are_refused(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora()
    block = model.get_submodule("base_model.model.model.layers.1")
    block.register_forward_pre_hook(lambda _, args: (2.0 * args[0], *args[1:]))
    before = state_of(model)
    with pytest.raises(UnsupportedAdapterError, match="not a plain chain"):
        solve(model, settings())
    assert_same_state(model, before)


@pytest.mark.parametrize("times", [0, 2])
def test_a_module_that_does_not_run_once_is_refused(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    model = make_pico_lora()
    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: x + sum(forward(x) for _ in range(times)))
    with pytest.raises(UnsupportedAdapterError, match=f"{DOWN} ran {times} times"):
        solve(model, settings())


def test_a_module_that_sees_other_rows_than_tokens_is_refused(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pico_lora()
    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: forward(torch.cat([x, x], dim=1))[:, : x.shape[1]])
    with pytest.raises(UnsupportedAdapterError, match=rf"{DOWN} received \d+ rows for \d+ tokens"):
        solve(model, settings())


def test_the_model_must_compute_with_the_adapter_that_is_solved(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora()
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(IncompatibleError, match=r"set_adapter\('other'\)"):
        solve(model, settings(), adapter_name="other")
    with model.disable_adapter(), pytest.raises(IncompatibleError, match=r"disable_adapter\(\)"):
        solve(model, settings(), adapter_name="default")


# The model afterwards


def oddly_set_up(make_pico_lora: MakeLora) -> PeftModel:
    """A model in training mode whose flags are not those that PEFT gives, with a second, idle adapter."""
    model = make_pico_lora(lora_dropout=0.5)
    model.add_adapter("idle", LoraConfig(r=2, target_modules=["q_proj"]))
    model.train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    lora_layers(model, "default")[DOWN].lora_A["default"].weight.requires_grad_(False)
    model.get_submodule("base_model.model.lm_head").weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("teacher", ["base", "reference"])
def test_solving_leaves_the_model_as_it_was(make_pico_lora: MakeLora, teacher: str) -> None:
    model = oddly_set_up(make_pico_lora)
    before = state_of(model)
    solve(model, settings(), safe_teacher=None if teacher == "base" else LiveAdapter(make_pico_lora(r=6)).snapshot())
    assert_same_state(model, before)


class Failing:
    """A hook that raises at its n-th call; without n it only counts."""

    def __init__(self, error: type[BaseException] = RuntimeError, at: int | None = None) -> None:
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["first-call", "middle", "last-call"])
@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", DOWN], ids=["first-module", "last-module"])
def test_a_failure_anywhere_leaves_the_model_as_it_was(
    make_pico_lora: MakeLora, module: str, share: float, error: type[BaseException]
) -> None:
    model, config, rows = oddly_set_up(make_pico_lora), settings(), {"safety": SAFETY[:3], "utility": UTILITY[:3]}
    layer = lora_layers(model, "default")[module].base_layer
    counting = Failing()
    handle = layer.register_forward_hook(counting)
    solve(model, config, **rows)
    handle.remove()
    layer.register_forward_hook(Failing(error, max(1, round(share * counting.calls))))
    before = state_of(model)
    with pytest.raises(error):
        solve(model, config, **rows)
    assert_same_state(model, before)
