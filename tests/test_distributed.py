"""A model spread over two processes is realigned to what one process gives; what one rank meets, all ranks say.

The programs are in distributed_programs.py. Those that need a trainer are slow; DeepSpeed comes from the folder that
PEFT_NLSR_DEEPSPEED names (`DS_BUILD_OPS=0 pip install --no-deps --target FOLDER deepspeed einops hjson msgpack ninja
py-cpuinfo`), else from the environment.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import distributed_programs as programs
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import assert_same_factors, assert_same_state, factors_of, state_of
from transformers import LlamaConfig, LlamaForCausalLM

from peft_nlsr.adapter_folder import AdapterFolder
from peft_nlsr.calibration import SafetyStatistics, collect_statistics
from peft_nlsr.distributed import gathered_factors, on_rank_zero, write_updates
from peft_nlsr.errors import CalibrationError, IncompatibleError, PeftNLSRError
from peft_nlsr.examples import read_examples
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.lowrank import LowRank, fingerprint
from peft_nlsr.processes import on_every_rank
from peft_nlsr.realign import nlsr_realign
from peft_nlsr.reference import starting_point
from peft_nlsr.summing import own_batches, reduce_statistics

ROOT = Path(__file__).parent.parent
TOGETHER = "faults,shards,shares,sums"  # one start of two processes for all of them
WITH_CALLBACK = ("ddp", "fsdp2", "zero2", "zero3")
KINDS = ("ddp", "fsdp2", "fsdp2-bf16", "zero2", "zero2-bf16", "zero3", "zero3-bf16")

Told = tuple[Path, list[dict[str, Any]]]
Launch = Callable[[str, str], Told]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved base model with tied embeddings."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, tie_word_embeddings=True)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def launch(base: str, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """A function `(names, name) -> (its folder, what each rank told)` that runs programs once a session."""
    done: dict[str, tuple[Path, int, str]] = {}

    def start(names: str, name: str) -> Told:
        if names not in done:
            out = tmp_path_factory.mktemp("out")
            done[names] = out, *run_on_two(names, base, out)
        out, code, log = done[names]
        assert code == 0, log[-3000:]
        folder = out / name
        return folder, [json.loads((folder / f"told{rank}.json").read_text()) for rank in (0, 1)]

    return start


def run_on_two(names: str, base: str, out: Path) -> tuple[int, str]:
    """Exit code and output of programs on two processes of their own group, which is ended when it hangs."""
    if names.startswith("zero") and not (
        os.environ.get("PEFT_NLSR_DEEPSPEED") or importlib.util.find_spec("deepspeed")
    ):
        pytest.skip("DeepSpeed is not installed, and PEFT_NLSR_DEEPSPEED names no folder with it")
    paths = [str(ROOT), str(ROOT / "tests")]
    if names.startswith("zero"):
        paths.append(os.environ.get("PEFT_NLSR_DEEPSPEED", ""))
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", programs.__file__]
    process = subprocess.Popen(
        [sys.executable, *command, names, base, str(out)],
        env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{names} hangs: {process.communicate()[0][-3000:]}")
    return process.returncode, log


def in_precision(model: PeftModel, portrait: Mapping[str, Any]) -> PeftModel:
    """The model with each parameter in the dtype that it has in the portrait."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(getattr(torch, portrait["tensors"][name][0].removeprefix("torch.")))
    return model


def factors_in(path: Path, model: PeftModel) -> dict[str, LowRank]:
    tensors = load_file(path)
    scales = {name: update.scale for name, update in LiveAdapter(model).items()}
    names = [name for name in scales if f"{name}.A" in tensors]
    return {name: LowRank(tensors[f"{name}.A"], tensors[f"{name}.B"], scales[name]) for name in names}


def assert_close(found: Mapping[str, LowRank], expected: Mapping[str, LowRank], atol: float) -> None:
    assert set(found) == set(expected)
    for name, update in expected.items():
        for one, other in ((found[name].A, update.A), (found[name].B, update.B)):
            torch.testing.assert_close(one.float(), other.float(), rtol=0.0, atol=atol)


def before_training_ended(folder: Path, told: Mapping[str, Any], base: str) -> PeftModel:
    """The single-process model with the weights that the two processes realigned."""
    model = in_precision(programs.lora_model(base), told["portrait"])
    LiveAdapter(model).write(factors_in(folder / "before.safetensors", model))
    model.config.use_cache = told["portrait"]["config"]["use_cache"]  # a trainer turns it off
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
class TestATrainedModel:
    def test_gets_the_result_of_a_single_process(self, kind: str, launch: Launch, base: str) -> None:
        folder, told = launch(kind, kind)
        model = before_training_ended(folder, told[0], base)
        expected = programs.planned(model).updates
        assert_close(factors_in(folder / "planned.safetensors", model), expected, atol=1e-5)
        LiveAdapter(model).write(expected)
        rounding = 1e-5 if not kind.endswith("bf16") else 2e-3
        assert_close(factors_in(folder / "after.safetensors", model), LiveAdapter(model), atol=rounding)
        assert_close(AdapterFolder(folder / "saved"), LiveAdapter(model), atol=rounding)

    def test_keeps_the_patch_through_a_step_of_size_zero(self, kind: str, launch: Launch) -> None:
        _, told = launch(kind, kind)
        start, before, seen_by_the_plan, after, stepped = told[0]["fingerprints"]
        assert start != before == seen_by_the_plan != after == stepped
        assert told[1]["fingerprints"] == told[0]["fingerprints"]

    def test_without_its_optimizer_is_written_to_or_refused(self, kind: str, launch: Launch) -> None:
        for told in launch(kind, kind)[1]:
            if kind.startswith("zero2"):
                assert told["without optimizer"][0] == "PeftNLSRError" and "optimizer=" in told["without optimizer"][1]
            else:
                assert told["without optimizer"] == ["returned", None]

    def test_is_put_back_when_one_rank_is_interrupted_half_way(self, kind: str, launch: Launch) -> None:
        for told in launch(kind, kind)[1]:
            assert told["interrupted"] == ["KeyboardInterrupt", "stop"] and told["put back"]

    def test_keeps_its_parameters(self, kind: str, launch: Launch) -> None:
        assert [told["identity"] for told in launch(kind, kind)[1]] == [True, True]

    def test_is_computed_with_as_it_is(self, kind: str, launch: Launch, base: str) -> None:
        folder, told = launch(kind, kind)
        assert told[0]["portrait"] == told[1]["portrait"]
        assert_same_portrait(told[0]["portrait"], programs.portrait(before_training_ended(folder, told[0], base)))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k != "ddp" else k for k in WITH_CALLBACK])
class TestTheCallback:
    def test_gives_the_result_of_a_single_process(self, kind: str, launch: Launch, base: str) -> None:
        folder, _ = launch(f"{kind}-callback", f"{kind}-callback")
        model = programs.lora_model(base)
        start = starting_point(factors_of(model))
        LiveAdapter(model).write(factors_in(folder / "before.safetensors", model))
        utility = read_examples(programs.tokenised(), None, limit=16, max_length=24)
        judged = {"tokenizer": programs.word_tokenizer(), "judge": programs.refuses_attacks, "progress": False}
        nlsr_realign(model, programs.quick(), reference=start, utility=utility, **judged)
        assert_close(factors_in(folder / "after.safetensors", model), LiveAdapter(model), atol=1e-5)
        assert_close(AdapterFolder(folder / "saved"), LiveAdapter(model), atol=1e-5)

    def test_agrees_on_all_ranks_and_keeps_its_patch(self, kind: str, launch: Launch) -> None:
        _, told = launch(f"{kind}-callback", f"{kind}-callback")
        before, after, stepped = told[0]["fingerprints"]
        assert before != after == stepped and told[0]["recorded"] == [before, after]
        assert told[1] == told[0]
        assert told[0]["refused_rows"] == [1, 5] and told[0]["evaluations"] == ["fine-tuned", "realigned"]
        assert told[0]["reference"] == "the adapter that fine-tuning started from"
        assert told[0]["ranks"] == (2 if kind in ("ddp", "zero2") else 1)

    def test_saves_the_claim_with_the_weights(self, kind: str, launch: Launch) -> None:
        folder, _ = launch(f"{kind}-callback", f"{kind}-callback")
        record = json.loads((folder / "saved" / "nlsr_config.json").read_text())["record"]
        assert record["fingerprint_after"] == fingerprint(AdapterFolder(folder / "saved"))


def assert_same_portrait(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    logits, own = torch.tensor(found["logits"]), torch.tensor(expected["logits"])
    exact = all(dtype == "torch.float32" for dtype, _, _ in found["tensors"].values())
    torch.testing.assert_close(logits, own, rtol=0.0, atol=1e-5 if exact else 2e-2)
    for part in set(expected) - {"logits"}:
        assert found[part] == expected[part], part


class TestOneRankFails:
    @pytest.mark.parametrize(
        ("case", "kind", "words"),
        [
            ("work", "IncompatibleError", "rank 8, expected 16"),
            ("interrupt", "KeyboardInterrupt", "stop"),
            ("result", "AttributeError", "lambda"),
            ("elsewhere", "ValueError", "no disk"),
            ("adapter", "ValueError", "no adapter 'other'"),
            ("unknown", "IncompatibleError", "no LoRA on layer"),
            ("not finite", "CorruptFileError", "NaN or infinite"),
            ("diverging", "IncompatibleError", "differ between ranks"),
            ("interrupted", "KeyboardInterrupt", "stop"),
            ("interrupted growth", "KeyboardInterrupt", "stop"),
        ],
    )
    def test_and_every_rank_raises(self, case: str, kind: str, words: str, launch: Launch) -> None:
        for told in launch(TOGETHER, "faults")[1]:
            assert told[case][0] == kind and words in told[case][1]

    def test_with_an_error_that_cannot_be_sent(self, launch: Launch) -> None:
        here, there = (told["own class"] for told in launch(TOGETHER, "faults")[1])
        assert here == ["OwnError", "two words"]
        assert there == ["PeftNLSRError", "OwnError: two words"]

    def test_and_nothing_has_changed(self, launch: Launch) -> None:
        assert [told["unchanged"] for told in launch(TOGETHER, "faults")[1]] == [True, True]

    @pytest.mark.slow
    def test_and_a_run_that_does_not_catch_it_ends(self, base: str, tmp_path: Path) -> None:
        start = time.monotonic()
        code, log = run_on_two("stops", base, tmp_path)
        assert code != 0 and time.monotonic() - start < 100
        assert "list index out of range" in log


def test_tensors_come_back_as_they_were_sent(launch: Launch) -> None:
    assert [told["parcel"] for told in launch(TOGETHER, "faults")[1]] == [["returned", True]] * 2


def test_replicas_may_grow(launch: Launch) -> None:
    assert [told["grown"] for told in launch(TOGETHER, "faults")[1]] == [[6, 6]] * 2


@pytest.mark.slow
def test_work_may_take_longer_than_the_timeout_of_the_group(launch: Launch) -> None:
    assert [told["long"] for told in launch("waits", "waits")[1]] == [["returned", "done"]] * 2


class TestShards:
    @pytest.mark.parametrize("what", ["gathered", "gathered again", "written", "forward"])
    def test_are_read_and_written_as_a_whole(self, what: str, launch: Launch) -> None:
        assert [told[what] for told in launch(TOGETHER, "shards")[1]] == [True, True]

    def test_are_put_back_when_one_rank_is_interrupted_half_way(self, launch: Launch) -> None:
        for told in launch(TOGETHER, "shards")[1]:
            assert told["interrupted"] == ["KeyboardInterrupt", "stop"] and told["put back"]

    @pytest.mark.slow
    def test_are_put_back_when_another_rank_dies_half_way(self, base: str, tmp_path: Path) -> None:
        code, log = run_on_two("dies", base, tmp_path)
        assert code != 0
        assert (tmp_path / "dies" / "told0.json").exists(), log[-3000:]
        told = json.loads((tmp_path / "dies" / "told0.json").read_text())
        assert told["write"][0] != "returned" and told["put back"]

    def test_are_computed_with_as_one_plain_model(self, launch: Launch, base: str) -> None:
        for told in launch(TOGETHER, "shards")[1]:
            plain = programs.checkpointed(programs.lora_model(base))
            assert_same_portrait(told["portrait"], programs.portrait(plain))

    @pytest.mark.parametrize(
        ("case", "kind", "words"),
        [
            ("grown", "IncompatibleError", "compress=True"),
            ("live", "UnsupportedAdapterError", "sharded parameter"),
            ("live and whole", "UnsupportedAdapterError", "under FSDP2"),
            ("quantised", "UnsupportedAdapterError", "quantised base model"),
            ("fsdp1", "UnsupportedAdapterError", "FSDP1"),
            ("tensor parallel", "UnsupportedAdapterError", "tensor parallelism"),
        ],
    )
    def test_that_cannot_be_realigned_are_refused(self, case: str, kind: str, words: str, launch: Launch) -> None:
        for told in launch(TOGETHER, "shards")[1]:
            found, text = told[case]
            assert found == kind and words in text and "peft-nlsr realign ADAPTER --patch PATCH -o OUT" in text


class TestSums:
    @pytest.mark.parametrize("case", ["exact", "one"])
    def test_are_those_of_one_process(self, case: str, launch: Launch) -> None:
        folder, _ = launch(TOGETHER, "sums")
        for rank in (0, 1):
            alone = SafetyStatistics.load(folder / f"{case}{rank}_alone")
            reduced = SafetyStatistics.load(folder / f"{case}{rank}")
            assert list(reduced) == list(alone) and reduced.record == alone.record
            for name, mine in alone.items():
                assert reduced[name].tokens == mine.tokens
                assert mine.moment is not None and reduced[name].moment is not None
                torch.testing.assert_close(reduced[name].z_gram, mine.z_gram)
                torch.testing.assert_close(reduced[name].x_square, mine.x_square)
                torch.testing.assert_close(reduced[name].moment.full, mine.moment.full)

    def test_of_sketches_keep_a_bound_that_holds(self, launch: Launch) -> None:
        folder, _ = launch(TOGETHER, "sums")
        exact = SafetyStatistics.load(folder / "exact0_alone")
        for rank in (0, 1):
            for name, merged in SafetyStatistics.load(folder / f"sketch{rank}").items():
                whole, sketch = exact[name].moment, merged.moment
                assert whole is not None and whole.full is not None and sketch is not None and sketch.rows is not None
                lost = torch.linalg.eigvalsh(whole.full - sketch.rows.T @ sketch.rows)
                size = float(whole.full.diagonal().sum())
                assert len(sketch.rows) == 6
                assert -1e-6 * size <= float(lost[0]) and 0.0 < float(lost[-1]) <= sketch.error * size * (1 + 1e-6)

    @pytest.mark.parametrize(
        ("case", "kind", "words"),
        [
            ("mixed", "IncompatibleError", "do not belong together"),
            ("none", "CalibrationError", "no rank has statistics"),
            ("prepared", "ValueError", "before accelerator.prepare"),
        ],
    )
    def test_that_would_be_wrong_are_refused(self, case: str, kind: str, words: str, launch: Launch) -> None:
        for told in launch(TOGETHER, "sums")[1]:
            assert told[case][0] == kind and words in told[case][1]


class TestShares:
    @pytest.mark.parametrize("case", programs.SHARED)
    def test_give_the_solution_of_one_process(self, case: str, launch: Launch) -> None:
        one, other = (told[case] for told in launch(TOGETHER, "shares")[1])
        assert one == other
        assert one["gap"] < 1e-5
        assert one["counts"][0] == one["counts"][1] and one["notes"][0] == one["notes"][1]

    def test_are_less_work_for_each(self, launch: Launch) -> None:
        told = launch(TOGETHER, "shares")[1][0]
        assert told["full"]["cheaper"] < 0.7 < told["full, one batch"]["cheaper"] == 1.0
        assert told["full"]["ranks"] == 2

    @pytest.mark.parametrize(
        ("case", "rank"),
        [
            ("stopped at the beginning", 1),
            ("stopped in the middle", 1),
            ("stopped on rank 0", 0),
            ("stopped outside of an inner one", 1),
        ],
    )
    def test_that_fail_on_one_rank_are_given_up_by_all(self, case: str, rank: int, launch: Launch) -> None:
        for told in launch(TOGETHER, "shares")[1]:
            assert told[case] == ["RuntimeError", f"rank {rank} has no memory"]

    def test_leave_the_models_as_they_were(self, launch: Launch) -> None:
        assert [told["unchanged"] for told in launch(TOGETHER, "shares")[1]] == [True, True]

    def test_are_not_needed_by_a_rank_that_works_alone(self, launch: Launch) -> None:
        assert launch(TOGETHER, "shares")[1][0]["stopped without the others"] == ["returned", True]

    def test_go_on_after_an_interruption_with_the_same_bits(self, launch: Launch) -> None:
        for told in launch(TOGETHER, "shares")[1]:
            stopped, files, _, same, left = told["work_dir"]
            assert stopped[0] == "RuntimeError" and files == ["block_0000.safetensors", "two_teacher.json"]
            assert same and not left

    def test_do_not_go_on_with_another_number_of_ranks(self, launch: Launch) -> None:
        kind, text = launch(TOGETHER, "shares")[1][1]["work_dir"][2]
        assert kind == "IncompatibleError" and "differs in ranks" in text

    def test_realign_all_replicas_alike(self, launch: Launch) -> None:
        one, other = (told["realigned"] for told in launch(TOGETHER, "shares")[1])
        assert one == other and one["gap"] < 1e-5
        assert one["record"]["data"]["cost"]["ranks"] == 2 and one["alone"]["data"]["cost"]["ranks"] == 1
        screened = [found["data"]["utility"] for found in (one["record"], one["alone"])]
        assert screened[0] == screened[1] and screened[0]["refused_rows"] == [2]

    def test_are_written_by_all_or_none(self, launch: Launch) -> None:
        for told in launch(TOGETHER, "shares")[1]:
            kind, text, unchanged, recorded = told["interrupted"]
            assert (kind, text, unchanged, recorded) == ("KeyboardInterrupt", "stop", True, False)

    def test_with_other_arguments_are_refused(self, launch: Launch) -> None:
        for told in launch(TOGETHER, "shares")[1]:
            assert told["differing"][0] == "IncompatibleError" and "the configuration" in told["differing"][1]

    def test_need_replicas_that_are_the_same(self, launch: Launch) -> None:
        for told in launch(TOGETHER, "shares")[1]:
            together, failed, alone = told["replicas"]
            assert together == [2, True] and failed == ["ValueError", "no disk"] and alone == 1

    def test_have_no_part_in_other_methods(self, launch: Launch) -> None:
        one, other = (told["other method"] for told in launch(TOGETHER, "shares")[1])
        assert one == other and one[0] == "sum"


class TestADraw:
    def test_is_the_same_on_all_ranks_whatever_their_generators(self, launch: Launch, base: str) -> None:
        one, other = (told["drawn"] for told in launch(TOGETHER, "sums")[1])
        assert one == other == programs.drawn(base, seed=7)
        assert 0 < len(one[0]) < len(factors_of(programs.lora_model(base)))


class TestOnOneProcess:
    def test_work_gets_the_live_model(self, make_pico_lora: Callable[..., PeftModel]) -> None:
        model = make_pico_lora()
        assert on_rank_zero(model, lambda given: given) is model

    def test_writing_is_that_of_the_live_adapter(self, make_pico_lora: Callable[..., PeftModel]) -> None:
        model, other = make_pico_lora(), make_pico_lora()
        updates = {name: update.times(0.5) for name, update in LiveAdapter(make_pico_lora(seed=1)).items()}
        write_updates(model, updates)
        LiveAdapter(other).write(updates)
        assert_same_state(state_of(model), state_of(other))
        assert_same_factors(gathered_factors(model), factors_of(other))

    def test_an_update_that_does_not_fit_changes_nothing(self, make_pico_lora: Callable[..., PeftModel]) -> None:
        model = make_pico_lora()
        before, updates = state_of(model), gathered_factors(model)
        last = next(reversed(updates))
        updates[last] = LowRank(torch.zeros(4, 5), torch.zeros(6, 4))
        with pytest.raises(IncompatibleError, match="shape"):
            write_updates(model, {name: update.times(2.0) for name, update in updates.items()})
        assert_same_state(state_of(model), before)

    def test_master_copies_that_cannot_be_reached_are_named(self, make_pico_lora: Callable[..., PeftModel]) -> None:
        model = make_pico_lora()
        before = fingerprint(LiveAdapter(model))
        next(model.parameters())._hp_mapping = object()  # what DeepSpeed's ZeRO-1/2 leaves on a parameter
        with pytest.raises(PeftNLSRError, match="optimizer="):
            write_updates(model, {n: u.times(2.0) for n, u in LiveAdapter(model).items()})
        assert fingerprint(LiveAdapter(model)) == before

    def test_statistics_are_left_as_they_are(self, make_pico_lora: Callable[..., PeftModel]) -> None:
        batches = [{"input_ids": torch.arange(8).reshape(2, 4) + i} for i in range(3)]
        assert list(own_batches(batches)) == batches
        alone = collect_statistics(make_pico_lora(), batches, progress=False)
        reduced = reduce_statistics(alone)
        assert reduced.record == alone.record
        assert all(torch.equal(reduced[name].z_gram, alone[name].z_gram) for name in alone)
        with pytest.raises(CalibrationError, match="no rank"):
            reduce_statistics(None)

    def test_an_error_is_raised_as_it_is(self) -> None:
        with pytest.raises(ZeroDivisionError):
            on_every_rank(lambda: 1 // 0)
