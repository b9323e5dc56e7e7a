"""The benchmarks run from a configuration to a table, and what they compare is equal. Timings are never tested."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from benchmarks import adaptive, callback, continual, data_parallel, engine, generalisation, trigger, two_teacher_block
from peft_nlsr import wilson

FOLDER = Path(engine.__file__).parent
KEYS = {"name", "ours_s", "baseline_s", "ratio", "ours_wall_s", "baseline_wall_s", "error", "met"}
# The cast to bfloat16 is part of the error of stage3, the rounding of an SVD in float32 of that of statistics.
LARGEST_ERROR = {"statistics": 1e-3, "similarity": 1e-5, "one_pass": 1e-5, "stage3": 1e-2}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of the smallest configuration, through the files that the runner reads and writes."""
    output = tmp_path_factory.mktemp("benchmarks") / "results" / "smoke.json"
    threads = torch.get_num_threads()
    try:
        engine.main(["--config", str(FOLDER / "configs" / "engine-smoke.json"), "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    return json.loads(output.read_text("utf-8"))


def numbers(value: Any) -> list[float]:
    """All numbers in nested JSON values, truth values aside."""
    if isinstance(value, dict | list):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_results_name_config_machine_versions_and_all_cases(smoke):
    assert set(smoke) == {"config", "machine", "versions", "cases"}
    assert smoke["config"] == json.loads((FOLDER / "configs" / "engine-smoke.json").read_text("utf-8"))
    assert set(smoke["machine"]) == {"cpu", "threads", "system"}
    assert {"python", "torch", "peft_nlsr"} <= set(smoke["versions"])
    assert set(smoke["cases"]) == set(engine.CASES)


@pytest.mark.parametrize("case", engine.CASES)
def test_rows_hold_finite_figures_and_a_verdict(case, smoke):
    rows = smoke["cases"][case]["rows"]
    assert rows
    for row in rows:
        assert KEYS <= set(row)
        assert all(math.isfinite(number) for number in numbers(row))
        assert row["ours_s"] > 0.0
        assert row["ratio"] > 0.0


@pytest.mark.parametrize("case", engine.CASES)
def test_what_is_compared_is_equal(case, smoke):
    assert max(row["error"] for row in smoke["cases"][case]["rows"]) < LARGEST_ERROR[case]


def test_stage3_restores_half_of_the_modules_in_a_process_of_its_own(smoke):
    (row,) = smoke["cases"]["stage3"]["rows"]
    assert row["restored"] == 7
    assert 0.0 < row["call_s"] < row["ours_s"]
    assert row["imports_mb"] <= row["peak_mb"]


def test_unknown_case_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"no_such_case.*statistics, similarity"):
        engine.run({"threads": 1, "cases": {"no_such_case": {}}})


def test_readme_shows_the_committed_results():
    results = json.loads((FOLDER / "results" / "engine.json").read_text("utf-8"))
    assert engine.table(results) in (FOLDER / "README.md").read_text("utf-8")
    assert results["config"] == json.loads((FOLDER / "configs" / "engine.json").read_text("utf-8"))


def test_the_callback_table_is_that_of_the_committed_results():
    results = json.loads((FOLDER / "results" / "callback.json").read_text("utf-8"))
    assert callback.table(results) in (FOLDER / "README.md").read_text("utf-8")


def test_the_continual_table_is_that_of_the_committed_results():
    results = json.loads((FOLDER / "results" / "continual.json").read_text("utf-8"))
    assert continual.table(results) in (FOLDER / "README.md").read_text("utf-8")
    assert results["config"] == json.loads((FOLDER / "configs" / "continual.json").read_text("utf-8"))


def test_the_table_of_adaptive_attacks_is_that_of_the_committed_results():
    results = json.loads((FOLDER / "results" / "adaptive.json").read_text("utf-8"))
    assert adaptive.table(results) in (FOLDER / "README.md").read_text("utf-8")
    assert results["summary"] == adaptive.summary(results["rows"], results["config"]["prompts"])
    assert results["config"] == json.loads((FOLDER / "configs" / "adaptive.json").read_text("utf-8"))


def test_the_tables_of_what_lies_beyond_the_data_are_those_of_the_committed_results():
    results = json.loads((FOLDER / "results" / "generalisation.json").read_text("utf-8"))
    assert generalisation.table(results) in (FOLDER / "README.md").read_text("utf-8")
    assert results["summary"] == generalisation.summary(results["rows"])
    assert results["config"] == json.loads((FOLDER / "configs" / "generalisation.json").read_text("utf-8"))


def test_the_table_of_poison_with_a_trigger_is_that_of_the_committed_results():
    results = json.loads((FOLDER / "results" / "trigger.json").read_text("utf-8"))
    assert generalisation.table(results) in (FOLDER / "README.md").read_text("utf-8")
    assert results["summary"] == generalisation.summary(results["rows"])
    assert results["config"] == json.loads((FOLDER / "configs" / "trigger.json").read_text("utf-8"))


def test_the_forgetful_judge_misses_a_fifth_and_finds_nothing_more():
    prompts, refusal = [f"prompt {i}" for i in range(1000)], "i cannot help with that"
    missed = 1000 - sum(trigger.forgetful(prompts, [refusal] * 1000))
    assert 150 < missed < 250 and not any(trigger.forgetful(prompts, ["sure"] * 1000))


def test_prompts_with_one_verb_share_their_fate_in_the_interval():
    found = generalisation.measured(["a", "a", "b", "b", "c", "c"], [True, True, False, True, False, False])
    assert found == {"rate": 0.5, "n": 6, "verbs": 3, "hit": 2}
    rows = [{"case": "c", "lineage": "shared", "model": "m", "rates": {"harm": found}} for _ in range(2)]
    [line] = generalisation.summary(rows)
    assert (line["harm"]["low"], line["harm"]["high"]) == wilson(0.5, 6)
    assert "4 of 6 verbs" in generalisation.table({"summary": [line]})


@pytest.mark.parametrize(("stopped", "started"), [(0, 0), (5, 0), (9, 4), (3, 8)])
def test_the_sign_test_is_one_sided_and_exact(stopped: int, started: int):
    changed = stopped + started
    wanted = binomtest(stopped, changed, alternative="greater").pvalue if changed else 1.0
    assert continual.sign_test(stopped, started) == pytest.approx(wanted)


def test_a_verdict_compares_each_prompt_with_itself():
    before = [[True] * 10, [True] * 8 + [False] * 2, [False] * 10]
    after = [[True] * 9 + [False], [False] * 10, [True] + [False] * 9]
    found = continual.verdict(1, before, after, 1.0, 0.9)
    assert (found["stopped"], found["started"], found["own_harm_fell"]) == (8, 0, True)
    assert found["own_fell_by"] == pytest.approx(0.8) and found["others_fell_by"] == pytest.approx(0.0)
    assert found["earlier_held"] and found["task_kept"] and found["own_harm_left"]
    assert not continual.verdict(2, before, after, 1.0, 0.89)["own_harm_left"]
    assert not continual.verdict(2, after, before, 1.0, 0.89)["earlier_held"]


def test_the_two_teacher_solvers_agree_with_the_plain_way_on_the_smallest_block(tmp_path):
    config, output = FOLDER / "configs" / "two_teacher_block-smoke.json", tmp_path / "block.json"
    threads = torch.get_num_threads()
    try:
        two_teacher_block.main(["--config", str(config), "--output", str(output)])
        first = output.read_text("utf-8")
        two_teacher_block.main(["--config", str(config), "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    assert output.read_text("utf-8") == first, "finished groups are not run again"
    rows = json.loads(first)["rows"]
    assert [row["group"] for row in rows] == ["o_proj", "q, k, v", "down_proj", "gate, up"]
    for row in rows:
        assert all(math.isfinite(number) for number in numbers(row))
        assert row["error"] < 0.01 and row["error"] < 2.0 * row["error_said"] + 1e-4
        assert row["truncation_error"] == pytest.approx(row["truncation_error_baseline"], rel=0.2)


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("two_teacher_block*.json")), ids=lambda p: p.stem)
def test_the_two_teacher_tables_are_those_of_the_committed_results(path):
    results = json.loads(path.read_text("utf-8"))
    assert two_teacher_block.table(results) in (FOLDER / "README.md").read_text("utf-8")
    assert all(row["error"] <= 0.01 for row in results["rows"])


def test_the_table_of_the_shared_realignment_is_that_of_the_committed_results():
    results = json.loads((FOLDER / "results" / "data_parallel.json").read_text("utf-8"))
    assert data_parallel.table(results) in (FOLDER / "README.md").read_text("utf-8")
    assert results["summary"] == data_parallel.summary(results["rows"])
    assert results["config"] == json.loads((FOLDER / "configs" / "data_parallel.json").read_text("utf-8"))
    assert results["ranks"] == 2 and all(row["gap"] < 1e-5 for row in results["rows"])


@pytest.mark.slow
def test_two_processes_share_what_one_does_alone(tmp_path):
    world = json.loads((FOLDER / "configs" / "safety-smoke.json").read_text("utf-8"))["worlds"]["smoke"]
    config = json.loads((FOLDER / "configs" / "data_parallel.json").read_text("utf-8"))
    config |= {"lab": world, "seeds": [0], "repeats": 1, "examples": 8}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    files = ["--config", str(tmp_path / "config.json"), "--output", str(tmp_path / "out.json")]
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*started, "-m", "benchmarks.data_parallel", *files, "--cache", str(tmp_path)],
        cwd=FOLDER.parent,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    rows = json.loads((tmp_path / "out.json").read_text("utf-8"))["rows"]
    assert [row["name"] for row in rows] == [case["name"] for case in config["cases"]]
    assert all(row["gap"] < 1e-4 and len(row["rank_cpu_s"]) == 2 for row in rows)
