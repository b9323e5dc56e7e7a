"""Bad calls: one clear message, the documented exit code, no traceback, and no file is touched."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomise_lora
from peft import LoraConfig, get_peft_model
from test_cli import JUDGE, SETS, Run, _one_thread, _prepared, plain, run  # noqa: F401
from tiny import drift, hashes, make_patch
from transformers import LlamaForCausalLM

from peft_nlsr import cli, open_adapter, realign_folder
from peft_nlsr.cli.options import REFUSES
from peft_nlsr.defaults import MAX_NEW_TOKENS, TOLERANCE

WEIGHTS = "adapter_model.safetensors"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}

LIVE = ["--base", "base", *JUDGE, *SETS]
PATCH = ["--patch", "patch"]
NEW = ["-o", "new"]
EXTRACT = ["reference", "extract", "--base", "base", "--aligned"]

USAGE: dict[str, tuple[list[str], str]] = {
    "no-output": (["realign", "adapter", *PATCH], "give --output FOLDER, or --dry-run"),
    "no-patch-and-no-base": (["realign", "adapter", *NEW], "give --patch PATCH (files only), or --base MODEL"),
    "no-adapter": (["realign"], "Missing argument 'ADAPTER'"),
    "data-without-base": (
        ["realign", "adapter", *PATCH, "--utility", "train.jsonl", *NEW],
        "--utility needs the base",
    ),
    "options-of-the-model-without-base": (
        ["realign", "adapter", *PATCH, "--judge", "no.such:thing", "--tolerance", "0.5", "--device", "no", *NEW],
        "--judge, --device, --tolerance needs the base model: give --base MODEL",
    ),
    "work-dir-without-base": (["realign", "adapter", *PATCH, "--work-dir", "w", *NEW], "--work-dir needs the base"),
    "settings-file-options-without-base": (
        ["realign", "adapter", *PATCH, "-c", "options.yaml", *NEW],
        "--measure, --device, --tolerance needs the base model",
    ),
    "measure-without-base": (["realign", "adapter", *PATCH, "--measure", *NEW], "--measure needs the base model"),
    "patch-and-data": (["realign", "adapter", *PATCH, *LIVE, "--utility", "train.jsonl", *NEW], "exclude each other"),
    "unknown-preset": (
        ["realign", "adapter", *PATCH, *NEW, "--preset", "papr"],
        "not one of default, paper, released",
    ),
    "set-without-value": (["realign", "adapter", *PATCH, *NEW, "--set", "beta"], "expected NAME=VALUE"),
    "set-unknown": (["realign", "adapter", *PATCH, *NEW, "--set", "bta=1"], "did you mean 'beta'?"),
    "set-no-number": (["realign", "adapter", *PATCH, *NEW, "--set", "beta=much"], "beta='much' must be a number"),
    "set-no-whole-number": (["config", "--set", "max_samples=1.5"], "must be a whole number"),
    "set-no-boolean": (["config", "--set", "compress=perhaps"], "must be true or false"),
    "set-out-of-range": (["realign", "adapter", *PATCH, *NEW, "--set", "sparsity=1.5"], "must be in [0.0, 1.0)"),
    "set-not-a-choice": (["realign", "adapter", *PATCH, *NEW, "--set", "update=add"], "is not one of auto, sum, swap"),
    "no-settings-file": (["config", "-c", "nothing.yaml"], "nothing.yaml does not exist"),
    "settings-file-no-yaml": (["config", "-c", "broken.yaml"], "neither JSON nor YAML"),
    "settings-file-a-list": (["config", "-c", "list.yaml"], "holds no names with values"),
    "settings-file-unknown-key": (["config", "-c", "typo.yaml"], "did you mean 'ridge'?"),
    "settings-file-wrong-type": (["config", "-c", "type.yaml"], "must be a number"),
    "settings-where-none-are-taken": (
        ["evaluate", "--base", "base", "-c", "beta.yaml"],
        "holds 'beta', which evaluate",
    ),
    "bad-device": (["evaluate", "--base", "base", "--device", "toaster"], "--device toaster is no device"),
    "bad-dtype": (["evaluate", "--base", "base", "--dtype", "int8"], "--dtype int8 is not one of auto"),
    "evaluate-without-base": (["evaluate", "adapter"], "Missing option '--base'"),
    "bad-requirement": (["evaluate", "--base", "base", "--require", "harm<0.1"], "expected METRIC<=NUMBER"),
    "requirement-with-a-typo": (
        ["evaluate", "--base", "nowhere", "--require", "harm<=0.1"],
        "harm: will not be measured; with these prompts there are harm_rate, refusal_rate",
    ),
    "requirement-without-its-prompts": (
        ["evaluate", "--base", "nowhere", "--safety", "safety.txt", "--require", "over_refusal<=0.1"],
        "over_refusal: will not be measured",
    ),
    "prompts-but-not-measured": (
        ["realign", "adapter", *LIVE, "--task", "task.jsonl", *NEW],
        "--task says what is measured: give --measure too",
    ),
    "tolerance-but-not-measured": (
        ["realign", "adapter", *LIVE, "--tolerance", "0.5", *NEW],
        "--tolerance says what is measured: give --measure too",
    ),
    "set-of-another-kind": (["evaluate", "--base", "base", "--benign", "harmbench"], "holds safety prompts"),
    "revert-without-output": (["revert", "adapter"], "give --output FOLDER"),
    "patch-without-statistics": (["patch", "build", "aligned", *NEW], "give --base MODEL, or --statistics"),
    "patch-data-without-base": (
        ["patch", "build", "aligned", "--calibration", "no.jsonl", "--device", "no", *NEW],
        "--calibration, --device needs the base model: give --base MODEL",
    ),
    "patch-data-for-a-score-without": (
        ["patch", "build", "aligned", *LIVE[:4], "--set", "score=magnitude", "--calibration", "no.jsonl", *NEW],
        "score=magnitude needs no data, so leave out --calibration, --judge",
    ),
    "patch-base-beside-statistics": (
        ["patch", "build", "aligned", "--statistics", "s", "--base", "nowhere", "--calibration", "no.jsonl", *NEW],
        "--statistics leaves nothing for --base, --calibration to do",
    ),
    "patch-without-a-command": (["patch", "bild"], "No such command 'bild'"),
    "unknown-form": (["reference", "extrapolate", "aligned", "--form", "x", *NEW], "not one of exact, released"),
    "negative-beta": (["reference", "extrapolate", "aligned", "--beta", "-1", *NEW], "Invalid value for '--beta'"),
    "rank-zero": ([*EXTRACT, "a", "--rank", "0", *NEW], "Invalid value for '--rank'"),
    "no-unaligned-model": (["reference", "extract", "--aligned", "a", *NEW], "Missing option '--base'"),
    "unknown-method": (["compare", "adapter", "--base", "base", "--method", "best"], "known are default"),
    "method-with-a-typo": (
        ["compare", "adapter", "--base", "base", "--method", "a:updte=sum"],
        "did you mean 'update'",
    ),
    "space-without-values": (["tune", "adapter", "--base", "base", "--space", "ridge", *NEW], "expected NAME=VALUE"),
    "space-out-of-range": (["tune", "adapter", "--base", "base", "--space", "ridge=0", *NEW], "ridge=0.0 must be in"),
    "blocks-without-base": (["inspect", "adapter", "--blocks"], "--blocks asks the model: give --base MODEL"),
    "prompts-without-blocks": (
        ["inspect", "adapter", "--base", "base", "--safety", "no.jsonl", "--limit", "2"],
        "--safety, --limit is for asking the model: give --base MODEL --blocks too",
    ),
    "save-nothing": (["report", "done", "--save"], "give --before and --after"),
    "unknown-command": (["realing"], "No such command 'realing'"),
    "unknown-option": (["realign", "adapter", "--pach", "x"], "No such option: --pach"),
    "demo-without-a-seed": (["demo", "--seeds", "0"], "Invalid value for '--seeds'"),
    "demo-all-poison-and-more": (["demo", "--poison", "1.5"], "Invalid value for '--poison'"),
    "push-without-a-repository": (["push", "adapter"], "Missing argument 'REPO_ID'"),
}

FAILURES: dict[str, tuple[list[str], str]] = {
    "no-such-adapter": (["realign", "nowhere", *PATCH, *NEW], "'nowhere' is not an existing folder"),
    "no-such-path": (["realign", "/no/where", *PATCH, *NEW], "neither an existing folder nor a Hub id"),
    "folder-without-adapter": (["realign", "patch", *PATCH, *NEW], "no adapter_config.json"),
    "no-such-patch": (["realign", "adapter", "--patch", "nowhere", *NEW], "no safety patch at 'nowhere'"),
    "patch-is-an-adapter": (["realign", "adapter", "--patch", "adapter", *NEW], "adapter is no safety patch"),
    "patch-is-cut": (["realign", "adapter", "--patch", "cut-patch", *NEW], "truncated"),
    "patch-record-is-no-json": (["realign", "adapter", "--patch", "bad-patch", *NEW], "is not JSON"),
    "adapter-is-cut": (["realign", "cut-adapter", *PATCH, *NEW], "truncated"),
    "other-lineage": (
        ["realign", "other", *PATCH, *NEW],
        "which works for any adapter: peft-nlsr realign other --base MODEL --utility DATA -o OUT",
    ),
    "output-exists": (["realign", "adapter", *PATCH, "-o", "other"], "other exists and is not an empty"),
    "output-is-input": (["realign", "adapter", *PATCH, "-o", "adapter"], "adapter exists"),
    "output-inside-input": (["realign", "adapter", *PATCH, "-o", "adapter/new"], "inside the input"),
    "output-is-a-file": (["realign", "adapter", *PATCH, "-o", "train.jsonl"], "exists"),
    "realigned-already": (["realign", "done", *PATCH, *NEW], "done is realigned already"),
    "realigned-already-live": (["realign", "done", *LIVE, "--utility", "train.jsonl", *NEW], "is realigned already"),
    "method-needs-the-base": (
        ["realign", "adapter", "--reference", "aligned", "--set", "method=fgsn", *NEW],
        "needs the",
    ),
    "no-such-base": (["realign", "adapter", "--base", "nowhere", *NEW], "the base model 'nowhere' cannot be loaded"),
    "base-is-an-adapter": (["evaluate", "--base", "patch", "--tokenizer", "base"], "the base model 'patch' cannot be"),
    "base-of-another-size": (["realign", "adapter", "--base", "small", *NEW], "adapter and base model have different"),
    "base-is-a-pickle": (["evaluate", "--base", "pickled"], "the base model 'pickled' cannot be loaded"),
    "no-tokenizer": (["evaluate", "--base", "no-words"], "no tokenizer can be loaded from 'no-words'"),
    "no-such-data": (["realign", "adapter", *LIVE, "--utility", "no.jsonl", *NEW], "'no.jsonl' does not exist"),
    "data-not-json": (["realign", "adapter", *LIVE, "--utility", "broken.jsonl", *NEW], "line 2 is no JSON"),
    "data-of-unknown-kind": (["realign", "adapter", *LIVE, "--utility", "cli_judge.py", *NEW], "has no known ending"),
    "data-ragged": (["realign", "adapter", *LIVE, "--utility", "ragged.csv", *NEW], "line 3 has not the 2 columns"),
    "data-no-objects": (["realign", "adapter", *LIVE, "--utility", "texts.jsonl", *NEW], "line 2 is no object"),
    "data-no-rows": (["realign", "adapter", *LIVE, "--utility", "object.json", *NEW], "is no list of rows"),
    "data-not-on-the-hub": (["realign", "adapter", *LIVE, "--utility", "no/data", *NEW], "no data set from the Hub"),
    "rows-without-prompt": (["realign", "adapter", *LIVE, "--utility", "odd.jsonl", *NEW], "row 0 has the keys"),
    "judge-without-module": (["evaluate", "--base", "base", "--judge", "refuses"], "named module:function"),
    "judge-not-there": (["evaluate", "--base", "base", "--judge", "no_such_file:f"], "cannot be imported"),
    "judge-not-callable": (["evaluate", "--base", "base", "--judge", "cli_judge:none"], "nothing callable"),
    "no-such-prompts": (["evaluate", "--base", "base", "--safety", "no.txt"], "no.txt"),
    "evaluation-is-a-folder": (["evaluate", "--base", "nowhere", "-o", "patch"], "patch is a folder; give the name"),
    "comparison-is-a-folder": (["compare", "adapter", "--base", "nowhere", "-o", "patch"], "patch is a folder"),
    "inspection-is-a-folder": (["inspect", "nowhere", "-o", "patch"], "patch is a folder"),
    "audit-is-a-folder": (["audit", "train.jsonl", "--base", "nowhere", "-o", "patch"], "patch is a folder"),
    "task-without-answers": (["evaluate", "--base", "base", "--task", "safety.txt"], "has no answers"),
    "prompts-that-were-seen": (
        ["evaluate", "--base", "base", "--safety", "safety.txt", "--seen", "train.jsonl", "--seen", "safety.txt"],
        "prompts of 'safety.txt' are also in the data",
    ),
    "measured-on-its-own-data": (
        ["realign", "adapter", *LIVE, "--measure", "--utility", "train.jsonl", "--safety", "train.jsonl", *NEW],
        "prompts of 'train.jsonl' are also in the data",
    ),
    "never-realigned": (["revert", "adapter", *NEW], "cannot be reverted: it has no nlsr_config.json"),
    "revert-nowhere": (["revert", "nowhere", *NEW], "no adapter_config.json"),
    "verify-nowhere": (["verify", "nowhere"], "'nowhere' is not an existing folder"),
    "report-nowhere": (["report", "nowhere"], "is not a folder"),
    "report-never-realigned": (["report", "adapter"], "holds no record of a realignment"),
    "report-without-evaluation": (["report", "done", "--before", "no.json"], "the evaluation no.json does not exist"),
    "report-of-something-else": (["report", "done", "--before", "object.json"], "is no evaluation"),
    "page-is-a-folder": (["report", "done", "--html", "base"], "base is a folder"),
    "push-never-realigned": (["push", "adapter", "me/adapter"], "nothing was pushed"),
    "statistics-nowhere": (["patch", "build", "aligned", "--statistics", "nowhere", *NEW], "safety_statistics.json"),
    "reference-of-nothing": ([*EXTRACT, "base", *NEW], "alignment changed nothing"),
    "reference-of-adapters": ([*EXTRACT, "adapter", *NEW], "adapter"),
    "inspect-other-modules": (["inspect", "adapter", "--reference", "patch"], "adapter_config.json"),
    "audit-without-column": (["audit", "task.jsonl", "--base", "base", *JUDGE, "--source", "x"], "have no column 'x'"),
    "unknown-control": (
        ["compare", "adapter", "--base", "base", *JUDGE, "--control", "magic"],
        "unknown controls magic",
    ),
    "demo-into-a-file": (["demo", "-o", "train.jsonl"], "train.jsonl is a file"),
}

UNMET: dict[str, tuple[list[str], str]] = {
    "verify-the-original": (["verify", "adapter"], "adapter is not verified: record, fingerprint, modules"),
    "verify-changed-weights": (["verify", "changed"], "changed is not verified: fingerprint"),
    "push-preview-of-changed-weights": (["push", "changed", "me/x", "--dry-run"], "changed is not verified"),
    "revert-preview-of-the-original": (["revert", "adapter", "--dry-run"], "adapter cannot be reverted"),
}


@pytest.fixture(scope="session")
def _broken(
    _prepared: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    _pico_llama_original: LlamaForCausalLM,
) -> Path:
    """A working folder with things that are broken in one way each; one for all tests, because none changes it."""
    place = tmp_path_factory.mktemp("broken") / "place"
    shutil.copytree(_prepared, place)
    model = get_peft_model(copy.deepcopy(_pico_llama_original), LoraConfig(**LORA))
    for name, seed in (("other", 5), ("aligned", 0), ("adapter", None)):
        if seed is None:
            drift(model)
        else:
            randomise_lora(model, "default", seed=seed)
        model.save_pretrained(place / name)
    make_patch(open_adapter(place / "aligned")).save(place / "patch")
    realign_folder(place / "adapter", place / "done", patch=place / "patch")
    for name in ("cut-patch", "bad-patch"):
        shutil.copytree(place / "patch", place / name)
    shutil.copytree(place / "adapter", place / "cut-adapter")
    shutil.copytree(place / "done", place / "changed")
    shutil.copyfile(place / "adapter" / WEIGHTS, place / "changed" / WEIGHTS)
    for path in (place / "cut-patch" / "safety_patch.safetensors", place / "cut-adapter" / WEIGHTS):
        path.write_bytes(path.read_bytes()[:-7])
    (place / "bad-patch" / "safety_patch.json").write_text("{")
    _bad_models(place)
    texts = {
        "broken.yaml": "a: [1",
        "list.yaml": "[1, 2]",
        "typo.yaml": "rigde: 1",
        "type.yaml": "beta: [1]",
        "beta.yaml": "beta: 1",
        "options.yaml": "measure: true\ndevice: cpu\ntolerance: 0.5\ndtype: auto\nutility: null",
        "broken.jsonl": '{"prompt": "lamp"}\n{"prompt"\n',
        "ragged.csv": "prompt,response\nlamp,sure\nvase\n",
        "texts.jsonl": '{"prompt": "lamp"}\n"vase"\n',
        "object.json": '{"prompt": "lamp"}',
        "odd.jsonl": '{"question": "lamp"}\n',
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    return place


@pytest.fixture
def bad(_broken: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(_broken)
    return _broken


def _bad_models(folder: Path) -> None:
    """Base models that are too small, pickled, or without a tokenizer."""
    for name in ("small", "pickled", "no-words"):
        shutil.copytree(folder / "base", folder / name)
    config = json.loads((folder / "small" / "config.json").read_text())
    config["num_hidden_layers"] = 1
    config.pop("layer_types", None)
    (folder / "small" / "config.json").write_text(json.dumps(config))
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    for path in (folder / "no-words").glob("token*"):
        path.unlink()


def files(folder: Path) -> dict[str, str]:
    """What is on disk, Python's own caches left out."""
    return {path: found for path, found in hashes(folder).items() if "__pycache__" not in path}


def assert_ends(folder: Path, command: Run, arguments: list[str], words: str, expected: int) -> str:
    """The exit code, the words in the message, no traceback and no change on disk; stdout is returned."""
    before, listed = files(folder), sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    code, out, err = command(*arguments)
    assert code == expected, err
    assert "Traceback" not in err + out
    assert words.replace(" ", "").lower() in plain(err).replace(" ", "").lower(), err
    assert files(folder) == before
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == listed
    return out


def test_the_table_is_long_enough_and_uses_documented_codes() -> None:
    assert len(USAGE) + len(FAILURES) + len(UNMET) >= 40 and set(cli.EXIT_CODES) == {0, 1, 2, 3, 130}


@pytest.mark.parametrize("call", USAGE)
def test_a_wrong_call_is_a_usage_error(bad: Path, run: Run, call: str) -> None:  # noqa: F811
    assert assert_ends(bad, run, *USAGE[call], 2) == ""


UNSAID = {
    **{"measure": False, "trust_remote_code": False, "device": "auto", "dtype": "auto", "tolerance": TOLERANCE},
    **{"judge": REFUSES, "max_new_tokens": MAX_NEW_TOKENS, "utility": None, "work_dir": None, "tokenizer": None},
    **{"safety": None, "task": None, "harm_judge": None, "calibration": None, "weak": None},
}


def test_a_settings_file_may_say_what_is_so_anyway(bad: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    (tmp_path / "unsaid.yaml").write_text(json.dumps(UNSAID))
    code, _, err = run("realign", "adapter", *PATCH, "-c", str(tmp_path / "unsaid.yaml"), "--dry-run")
    assert code == 0, err
    code, _, err = run("realign", "adapter", *PATCH, "-c", str(tmp_path / "unsaid.yaml"), "--device", "auto", *NEW)
    assert code == 2 and "--device needs the base model" in plain(err)


@pytest.mark.parametrize("call", FAILURES)
def test_a_failure_is_one_message_on_stderr(bad: Path, run: Run, call: str) -> None:  # noqa: F811
    assert assert_ends(bad, run, *FAILURES[call], 1) == ""


@pytest.mark.parametrize("call", UNMET)
def test_what_is_not_met_ends_with_its_own_code(bad: Path, run: Run, call: str) -> None:  # noqa: F811
    assert assert_ends(bad, run, *UNMET[call], 3)


def test_a_failure_shows_its_traceback_when_asked(
    bad: Path,
    run: Run,  # noqa: F811
) -> None:
    code, _, err = run("--debug", "verify", "nowhere")
    assert code == 1 and "Traceback" in err and plain(err).count("not an existing folder") == 2


@pytest.mark.parametrize("call", UNMET)
def test_what_is_not_met_keeps_its_code_with_a_traceback(bad: Path, run: Run, call: str) -> None:  # noqa: F811
    code, _, err = run("--debug", *UNMET[call][0])
    assert code == 3 and "Traceback" in err


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes"), MemoryError()],
    ids=["accelerator", "cpu", "python"],
)
def test_memory_that_ran_out_is_one_message_with_advice(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: str) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = plain(capsys.readouterr().err)
    assert end.value.code == 1
    assert all(word in said for word in ("memory ran out", "nlsr_batch_size", "--dtype bfloat16", "offload"))


def test_other_failures_of_a_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()
