"""The cost model against counted operations and measured memory, and the choice of the solver."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_lora
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft_nlsr.config import NLSRConfig
from peft_nlsr.costs import (
    FULL_WIDTH,
    HELD,
    BlockPass,
    Group,
    Share,
    cheapest,
    choose_solver,
    estimate,
    in_words,
    operations,
    working_bytes,
)
from peft_nlsr.edits import NormalEquations
from peft_nlsr.examples import Example
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.lowrank import LowRank
from peft_nlsr.solvers import HeldTokens
from peft_nlsr.two_teacher import solve_two_teacher

BLOCK = [Group(65536, 4096, {"q": 4096, "k": 1024, "v": 1024}, 16), Group(65536, 14336, {"down": 4096}, 16)]


def group(tokens: int, d_in: int, d_out: int = 512, rank: int = 16) -> Group:
    return Group(tokens, d_in, {"m": d_out}, rank)


# The choice


def test_narrow_inputs_are_solved_in_full_and_what_is_asked_for_is_done() -> None:
    assert choose_solver("auto", group(10**6, FULL_WIDTH)) == "full"
    assert choose_solver("auto", group(10**6, FULL_WIDTH + 1)) in HELD
    assert choose_solver("full", group(10, 28672)) == "full"
    assert choose_solver("dual", group(10**6, 16)) == "dual"


def test_each_solver_is_the_cheapest_somewhere() -> None:
    assert cheapest(group(500, 14336, 4096)) == "dual"
    assert cheapest(group(65536, 28672, 8192)) == "iterative"
    assert cheapest(group(65536, 14336, 4096)) == "moment"
    assert cheapest(group(65536, 4096, 4096, rank=128)) == "moment"


@pytest.mark.parametrize("solver", HELD)
def test_operations_are_those_that_are_counted(solver: str) -> None:
    """torch counts matrix products only, so the widths are such that these are nearly all."""
    shape = group(600 if solver == "dual" else 6000, 512, 384, rank=4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.tokens, 512, generator=generator) * torch.arange(1, 513) ** -0.5
    y = x @ (torch.randn(512, 384, generator=generator) * 0.5 ** torch.arange(384))
    held = HeldTokens(solver)
    held.add(x, {"m": y}, torch.full((len(x),), 1.0 / len(x)))
    tuned = LowRank(torch.randn(4, 512, generator=generator), torch.zeros(384, 4), 1.0)
    with FlopCounterMode(display=False) as counter:
        held.solve({"m": tuned}, ridge=0.03, seed=0)
    assert 0.5 < counter.get_total_flops() / operations(solver, shape) < 2.0


# Memory


def wide_lora(hidden: int, inner: int) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    randomise_lora(model, "default", seed=4)
    return model.eval()


def long_examples(count: int, tokens: int) -> list[Example]:
    drawn = torch.randint(3, 64, (count, tokens), generator=torch.Generator().manual_seed(1)).tolist()
    return [Example(tuple(ids[:-4]), tuple(ids[-4:]), i) for i, ids in enumerate(drawn)]


def peak_of_tensors(trace: Path) -> float:
    """Bytes of the tensors alive at once at most, from a profiler's trace; the allocator's own waste is not in it."""
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


@pytest.mark.parametrize(
    ("solver", "sizes", "count"),
    [
        ("full", (128, 1536), 16),
        ("moment", (128, 2048), 32),
        ("dual", (256, 1024), 24),
        ("iterative", (128, 1536), 96),
    ],
)
def test_the_peak_memory_is_as_estimated(solver: str, sizes: tuple[int, int], count: int, tmp_path: Path) -> None:
    adapter = LiveAdapter(wide_lora(*sizes))
    config = NLSRConfig(solver=solver, nlsr_batch_size=8)
    solve: dict[str, Any] = {"utility": [], "safe_teacher": None, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            solution = solve_two_teacher(adapter, safety=long_examples(count, 128), config=config, **solve)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    peak = peak_of_tensors(tmp_path / "trace.json")
    assert peak > 50 * 2**20, "too small to tell one tensor from another"
    assert 0.8 < solution.estimate["peak_bytes"] / peak < 1.4


def test_an_estimate_adds_up_and_can_be_read() -> None:
    block = BlockPass(2 * 10**8, tuple(BLOCK))
    share = Share(tokens=80000, counted=70000, kept=65536, largest_batch=4096, nbytes=10**9, itemsize=2)
    one, two = (estimate([block] * blocks, [share], wanted="auto") for blocks in (1, 2))
    assert two.solve_operations == 2 * one.solve_operations == 2 * sum(operations(cheapest(g), g) for g in BLOCK)
    assert two.pass_operations == 2 * one.pass_operations > 2 * 4 * 2 * 10**8 * 80000
    assert two.peak_bytes == one.peak_bytes > 10**9 + max(working_bytes(cheapest(g), g, 2) for g in BLOCK)
    assert one.solvers == {4096: (cheapest(BLOCK[0]),), 14336: ("moment",)}
    assert "moment for 14336 inputs" in one.in_words() and "1 GB of it between blocks" in one.in_words()
    assert json.loads(json.dumps(one.to_dict()))["kept"] == 65536


def test_full_sums_see_all_tokens_and_the_others_those_that_were_drawn() -> None:
    block = BlockPass(10, (group(100, 512),))
    share = Share(tokens=400, counted=300, kept=100, largest_batch=10, nbytes=0, itemsize=4)
    assert estimate([block], [share], wanted="full").solve_operations == operations("full", group(300, 512))
    assert estimate([block], [share], wanted="moment").solve_operations == operations("moment", group(100, 512))


def test_costs_are_those_of_the_largest_share_and_tokens_those_of_all() -> None:
    shares = [Share(400, 300, 100, 10, 2000, 4), Share(200, 150, 50, 10, 1000, 4)]
    block = BlockPass(10, (Group(100, 512, {"a": 64, "b": 64}, 16, processes=2),))
    both, alone = (estimate([block], given, wanted="full") for given in (shares, shares[:1]))
    assert (both.tokens, both.counted, both.kept, both.ranks) == (600, 450, 150, 2)
    assert (both.pass_operations, both.peak_bytes) == (alone.pass_operations, alone.peak_bytes)
    assert "600 tokens on 2 ranks, each at most" in both.in_words()


@pytest.mark.parametrize("solver", ["full", *HELD])
def test_half_of_the_tokens_are_less_work_unless_every_rank_needs_all_of_them(solver: str) -> None:
    outputs = {"a": 512, "b": 512}
    whole, half = (Group(4000 // n, 512, outputs, 16, processes=n) for n in (1, 2))
    share = operations(solver, half) / operations(solver, whole)
    assert (share > 0.9) if solver == "dual" else (0.5 <= share < 0.8)


def test_sums_in_full_are_as_large_as_estimated() -> None:
    sums = NormalEquations.zeros(512, {"m": 512}, torch.device("cpu"))
    assert working_bytes("full", group(10, 512), 4) > 2 * (sums.moment.nbytes + sums.cross["m"].nbytes)


@pytest.mark.parametrize(
    ("amount", "text"), [(0.0, "0 B"), (999.0, "999 B"), (1e3, "1 kB"), (2.34e12, "2.34 TB"), (5e19, "5e+04 PB")]
)
def test_large_numbers_are_readable(amount: float, text: str) -> None:
    assert in_words(amount, "B") == text
