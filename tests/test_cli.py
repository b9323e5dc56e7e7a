"""The commands as a user types them: data on stdout, all else on stderr, one command = one library call."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from tiny import QUICK, assert_same_factors, drift, factors_of, hashes, make_patch, rows, word_tokenizer
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from peft_nlsr import (
    NLSRConfig,
    SafetyPatch,
    __main__,
    build_safety_patch,
    cli,
    evaluate,
    load_prompt_set,
    nlsr_realign,
    open_adapter,
    realign_folder,
)
from peft_nlsr.adapter_folder import AdapterFolder
from peft_nlsr.lowrank import fingerprint
from peft_nlsr.projection import HOW_TO_GET_ONE
from peft_nlsr.report import SafetyReport

MakeLora = Callable[..., PeftModel]
Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent
JUDGE = ["--judge", "cli_judge:attacks"]
SETS = [word for name, value in QUICK.items() for word in ("--set", f"{name}={value}")]
PROMPTS = ["--safety", "safety.txt", "--benign", "benign.txt", "--max-new-tokens", "2"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _prepared(tmp_path_factory: pytest.TempPathFactory, _pico_llama_original: LlamaForCausalLM) -> Path:
    """A base model with its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("prepared")
    _pico_llama_original.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "train.jsonl", [{**row, "origin": "web"} for row in rows(12, poisoned=(3, 7))])
    write_rows(folder / "task.jsonl", [{"prompt": f"lamp word{i}", "response": "sure"} for i in range(4)])
    (folder / "safety.txt").write_text("\n".join(f"attack word{i}" for i in range(20, 24)))
    (folder / "benign.txt").write_text("\n".join(f"vase word{i}" for i in range(4)))
    (folder / "calibration.txt").write_text("\n".join(f"attack word{i}" for i in range(6)))
    (folder / "cli_judge.py").write_text(
        "def attacks(prompts, responses):\n    return ['attack' in p for p in prompts]\n"
    )
    return folder


@pytest.fixture
def place(_prepared: Path, tmp_path: Path, make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: ``base``, ``adapter``, ``aligned``, ``patch``, ``other`` (of another lineage) and data."""
    shutil.copytree(_prepared, tmp_path, dirs_exist_ok=True)
    drift(make_pico_lora(seed=0)).save_pretrained(tmp_path / "adapter")
    make_pico_lora(seed=0).save_pretrained(tmp_path / "aligned")
    make_pico_lora(seed=5).save_pretrained(tmp_path / "other")
    make_patch(factors_of(make_pico_lora(seed=0))).save(tmp_path / "patch")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``peft-nlsr`` in this process: exit code, stdout, stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-nlsr", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        return (code if isinstance(code, int) else int(bool(code)), *capsys.readouterr())

    return command


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def plain(text: str) -> str:
    """Without colours, boxes and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


COMMANDS = (
    "demo config realign revert verify push evaluate report compare tune inspect audit calibrate patch-build "
    "patch-show reference-extract reference-extrapolate"
).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_an_example_and_the_exit_codes(run: Run, command: str) -> None:
    code, out, err = run(*command.split("-"), "--help")
    text = plain(out)
    assert (code, err) == (0, "") and f"Usage: peft-nlsr {command.replace('-', ' ')}" in text
    assert f"Example: peft-nlsr {command.replace('-', ' ')}" in text
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "130 interrupted" in text


def test_the_top_help_lists_every_command(run: Run) -> None:
    code, out, err = run("--help")
    text = plain(out)
    assert (code, err) == (0, "") and "without training" in text
    assert [name for name in COMMANDS if f" {name.split('-')[0]} " not in text] == []
    assert [code for code in cli.EXIT_CODES if f"{code} {cli.EXIT_CODES[code]}" not in text] == []


def test_no_command_shows_the_help(run: Run) -> None:
    code, out, err = run()
    assert "Usage: peft-nlsr" in plain(out + err) and code != 1


@pytest.mark.parametrize("arguments", [["--help"], ["realign", "--help"]], ids=["top", "realign"])
def test_python_m_is_the_same_command_and_help_loads_no_torch(arguments: list[str]) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    runpy.run_module('peft_nlsr', run_name='__main__', alter_sys=True)\n"
        "finally:\n    print('LOADED', [m for m in ('torch', 'peft', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout and "LOADED []" in done.stdout


def test_realign_writes_the_folder_and_says_how_to_undo_it(place: Path, run: Run) -> None:
    before = hashes(place)
    code, out, err = run("realign", "adapter", "--patch", "patch", "-o", "out")
    assert code == 0
    assert out.startswith("sum (a patch and adapter files); preset default\nreference: the aligned adapter\n3 of 6")
    assert err == "Wrote out.\nNext: peft-nlsr verify out\nUndo: peft-nlsr revert out -o ORIGINAL\n"
    realign_folder(place / "adapter", place / "expected", patch=place / "patch")
    assert hashes(place / "out") == hashes(place / "expected")
    after = hashes(place)
    assert {path: after[path] for path in before} == before


def test_json_on_stdout_is_the_record_and_notes_go_to_stderr(place: Path, run: Run) -> None:
    code, out, err = run("realign", "adapter", "--patch", "patch", "--output", "out", "--preset", "released", "--json")
    assert code == 0 and json.loads(out) == json.loads((place / "out" / "nlsr_config.json").read_text())["record"]
    assert json.loads(out)["preset"] == "released" and json.loads(out)["method"] == "swap"
    assert err.startswith("Wrote out.")


@pytest.mark.parametrize("output", [[], ["-o", "out"]], ids=["no-output", "output-ignored"])
def test_a_dry_run_reports_and_writes_nothing(place: Path, run: Run, output: list[str]) -> None:
    before = hashes(place)
    code, out, err = run("realign", "adapter", "--patch", "patch", "--dry-run", "--json", *output)
    assert code == 0 and err.startswith("Nothing was written") and json.loads(out)["fingerprint_after"] is None
    code, out, err = run("realign", "adapter", "--patch", "patch", "--dry-run", *output)
    assert code == 0 and "3 of 6 modules changed" in out
    assert hashes(place) == before


def test_revert_gives_the_original_back(place: Path, run: Run) -> None:
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    code, out, err = run("revert", "out", "-o", "back")
    assert (code, out) == (0, "") and err.startswith("Wrote back.\nIt is the adapter as it was")
    assert hashes(place / "back") == hashes(place / "adapter")


def test_no_diff_leaves_the_diff_out(place: Path, run: Run) -> None:
    assert run("realign", "adapter", "--patch", "patch", "-o", "out", "--no-diff")[0] == 0
    assert not (place / "out" / "nlsr_diff.safetensors").exists()


def test_paths_are_printed_as_they_are(place: Path, run: Run) -> None:
    name = "[red]" + "long-name-" * 15
    code, _, err = run("realign", "adapter", "--patch", "patch", "-o", name)
    assert code == 0
    assert err == f"Wrote {name}.\nNext: peft-nlsr verify '{name}'\nUndo: peft-nlsr revert '{name}' -o ORIGINAL\n"


def test_ctrl_c_leaves_no_files_and_no_traceback(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_nlsr import folders

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = hashes(place)
    monkeypatch.setattr(folders, "restore", interrupted)
    code, out, err = run("realign", "adapter", "--patch", "patch", "-o", "out")
    assert (code, out) == (130, "") and err.startswith("Interrupted.")
    assert hashes(place) == before and not (place / "out").exists()


def test_an_error_of_ours_is_not_hidden(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is no user's mistake: what is not expected keeps its traceback."""
    from peft_nlsr import folders

    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(folders, "restore", broken)
    monkeypatch.setattr(sys, "argv", ["peft-nlsr", "realign", "adapter", "--patch", "patch", "-o", "out"])
    with pytest.raises(KeyError, match="a bug"):
        cli.main()


def test_without_the_cli_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "peft_nlsr.cli")
    with pytest.raises(SystemExit, match=r"pip install 'peft-nlsr\[cli\]'"):
        __main__.main()


def test_ctrl_c_while_the_command_line_loads_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 130


def test_a_spread_model_gives_the_same_files(place: Path, run: Run) -> None:
    call = ["realign", "adapter", "--base", "base", "--utility", "train.jsonl", *JUDGE, *SETS]
    for device in ("cpu", "balanced"):
        code, _, err = run(*call, "--device", device, "-o", device)
        assert code == 0, err
    assert_same_factors(dict(open_adapter("balanced")), dict(open_adapter("cpu")))


def test_a_model_that_fits_nowhere_is_refused(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    room = psutil.virtual_memory()._replace(available=20_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    code, _, err = run("evaluate", "adapter", "--base", "base", "--device", "balanced")
    assert code == 1 and "does not fit into the memory of GPUs and CPU together" in plain(err)


def test_a_quantised_checkpoint_is_loaded_where_it_stays(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")

    def not_moved(*_: Any) -> None:
        raise ValueError("`.to` is not supported")  # what older versions of bitsandbytes say

    bits = BitsAndBytesConfig(load_in_8bit=True)
    LlamaForCausalLM.from_pretrained("base", quantization_config=bits, device_map="cpu").save_pretrained("base8")
    shutil.copytree("base", "base8", dirs_exist_ok=True, ignore=lambda _, names: {"config.json", "model.safetensors"})
    monkeypatch.setattr(LlamaForCausalLM, "to", not_moved)
    code, _, err = run("evaluate", "adapter", "--base", "base8", "--device", "cpu", *PROMPTS, *JUDGE, "--json")
    assert code == 0, err


def test_a_live_realignment_is_the_library_call(place: Path, run: Run, make_pico_lora: MakeLora) -> None:
    before = hashes(place)
    data = ["--utility", "train.jsonl", "--calibration", "calibration.txt"]
    code, out, err = run("realign", "adapter", "--base", "base", *data, *JUDGE, *SETS, "-o", "out", "--json")
    assert code == 0, err
    judge = __import__("cli_judge").attacks
    model = nlsr_realign(
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter"),
        NLSRConfig(**QUICK),
        utility=read_lines(place / "train.jsonl"),
        calibration=[{"prompt": line} for line in (place / "calibration.txt").read_text().splitlines()],
        tokenizer=word_tokenizer(),
        judge=judge,
        progress=False,
    )
    assert_same_factors(factors_of(model), dict(open_adapter("out")))
    record = json.loads(out)
    assert record["method"] == "two_teacher" and record["data"]["utility"]["refused_rows"] == [3, 7]
    assert record == json.loads((place / "out" / "nlsr_config.json").read_text())["record"]
    assert str(place) not in (place / "out" / "nlsr_config.json").read_text()
    assert run("verify", "out")[0] == 0
    assert run("revert", "out", "-o", "back")[0] == 0
    after = hashes(place)
    assert {path: after[path] for path in before} == before
    assert after["back/adapter_model.safetensors"] == after["adapter/adapter_model.safetensors"]


def test_a_live_dry_run_says_first_what_it_costs(place: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    call = ["realign", "adapter", "--base", "base", "--utility", "train.jsonl", *JUDGE, *SETS]
    code, out, _ = run(*call, "--dry-run", "--json", "--work-dir", "work")
    assert code == 0 and not (place / "work").exists()
    assert "FLOP in passes of the model" in caplog.text and "full for 32 inputs" in caplog.text
    assert json.loads(out)["data"]["cost"]["solvers"] == {"32": ["full"], "48": ["full"]}


@pytest.mark.parametrize(
    ("method", "settings"),
    [("fgsn", {"safety_layers": "0-1"}), ("safelora", {}), ("antidote", {"score": "wanda"}), ("resta", {})],
    ids=["fgsn", "safelora", "antidote", "resta"],
)
def test_a_live_realignment_by_another_method_is_the_library_call(
    place: Path, run: Run, method: str, settings: dict[str, Any]
) -> None:
    given = ["--reference", "other"] if method != "antidote" else []
    given += ["--utility", "train.jsonl"] if method == "fgsn" else []
    sets = [word for name, value in {"method": method, **settings}.items() for word in ("--set", f"{name}={value}")]
    code, out, err = run("realign", "adapter", "--base", "base", *given, *SETS, *sets, "-o", "out", "--json")
    assert code == 0 and json.loads(out)["method"] == method, err
    model = nlsr_realign(
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter"),
        NLSRConfig(**QUICK, method=method, **settings),
        reference=None if method == "antidote" else "other",
        utility=read_lines(place / "train.jsonl") if method == "fgsn" else None,
        tokenizer=word_tokenizer(),
        progress=False,
    )
    assert_same_factors(factors_of(model), dict(open_adapter("out")))
    assert run("verify", "out")[0] == 0
    assert run("revert", "out", "-o", "back")[0] == 0
    assert fingerprint(AdapterFolder("back")) == fingerprint(AdapterFolder("adapter"))


def test_a_further_safety_dimension_continues_from_the_folder(place: Path, run: Run) -> None:
    sets = [*SETS, "--set", "method=fgsn", "--set", "safety_layers=0-1", "--set", "harmful_rows=0.6"]
    call = ["--base", "base", "--reference", "other", "--utility", "train.jsonl", *sets]
    assert run("realign", "adapter", *call, "--set", "safety_dimension=one", "-o", "first")[0] == 0
    more = ["--calibration", "calibration.txt", "--set", "safety_dimension=two", "--json"]
    code, out, err = run("realign", "first", *call, *more, "-o", "second")
    assert code == 0, err
    assert [found["name"] for found in json.loads(out)["data"]["fgsn"]["dimensions"]] == ["one", "two"]
    assert run("verify", "second")[0] == 0 and run("revert", "second", "-o", "back")[0] == 0
    assert fingerprint(AdapterFolder("back")) == fingerprint(AdapterFolder("adapter"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_live_realignment_keeps_the_stored_dtype(
    place: Path, run: Run, make_pico_lora: MakeLora, dtype: torch.dtype
) -> None:
    drift(make_pico_lora(seed=0)).to(dtype).save_pretrained("narrow")
    call = ("realign", "narrow", "--base", "base", "--utility", "train.jsonl", *JUDGE, *SETS, "-o", "out")
    assert run(*call, "--calibration", "calibration.txt")[0] == 0
    assert {update.A.dtype for update in AdapterFolder("out").values()} == {dtype}
    assert run("verify", "out")[0] == 0 and run("revert", "out", "-o", "back")[0] == 0
    assert fingerprint(AdapterFolder("back")) == fingerprint(AdapterFolder("narrow"))


def test_a_closed_gate_writes_nothing_and_an_open_one_keeps_the_report(place: Path, run: Run) -> None:
    data = ["--utility", "train.jsonl", "--calibration", "calibration.txt", *PROMPTS, *SETS]
    call = ["realign", "adapter", "--base", "base", *data, "--measure", "-o", "out"]
    (place / "cli_never.py").write_text("def never(prompts, responses):\n    return [False for _ in prompts]\n")
    code, out, err = run(*call, "--judge", "cli_never:never", "--set", "screening=false")
    assert code == 3 and "the harm rate did not fall" in err and not (place / "out").exists()
    code, out, err = run(*call, *JUDGE, "--tolerance", "1", "--task", "task.jsonl", "--json")
    assert code == 0 and json.loads(out)["after"]["rates"]["harm_rate"]["n"] == 4, err
    assert json.loads(out)["after"]["rates"]["task_accuracy"]["n"] == 4
    assert json.loads(out)["after"]["settings"]["answer_rows"] == "rows of the repair"
    assert any("measured on the rows of the repair" in note for note in json.loads(out)["record"]["notes"])
    assert SafetyReport.load("out").to_dict() == json.loads(out)
    assert run("verify", "out")[0] == 0


def test_a_patch_from_statistics_is_the_patch_from_the_model(place: Path, run: Run) -> None:
    call = ["aligned", "--calibration", "calibration.txt", *JUDGE, *SETS]
    assert run("patch", "build", *call, "--base", "base", "-o", "direct")[0] == 0
    assert run("calibrate", *call, "--base", "base", "-o", "statistics")[0] == 0
    assert run("patch", "build", "aligned", "--statistics", "statistics", *SETS, "-o", "later")[0] == 0
    made = hashes(place)
    assert made["direct/safety_patch.safetensors"] == made["later/safety_patch.safetensors"]
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "aligned")
    expected = build_safety_patch(
        model,
        NLSRConfig(**QUICK),
        calibration=[{"prompt": line} for line in (place / "calibration.txt").read_text().splitlines()],
        tokenizer=word_tokenizer(),
        judge=__import__("cli_judge").attacks,
        progress=False,
    )
    assert SafetyPatch.load("direct").record == expected.record
    assert "by what matters for the calibration inputs" in plain(run("patch", "show", "direct")[1])
    assert "by size alone in 6 modules" in plain(run("patch", "show", "patch")[1])
    code, out, _ = run("patch", "show", "direct", "--json")
    assert code == 0 and json.loads(out) == json.loads((place / "direct" / "safety_patch.json").read_text())


def test_an_evaluation_is_the_library_call_and_its_limit_is_a_gate(place: Path, run: Run) -> None:
    call = ["evaluate", "adapter", "--base", "base", *PROMPTS, "--task", "task.jsonl", *JUDGE, "--json"]
    code, out, err = run(*call, "-o", "found.json", "--require", "over_refusal<=0.5")
    assert code == 0 and json.loads(out) == json.loads((place / "found.json").read_text()), err
    expected = evaluate(
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter"),
        word_tokenizer(),
        prompts=[load_prompt_set(f"{kind}.txt", kind=kind) for kind in ("safety", "benign")],
        task=load_prompt_set("task.jsonl", kind="task"),
        judge=__import__("cli_judge").attacks,
        max_new_tokens=2,
        progress=False,
    )
    assert json.loads(out)["verdicts"] == expected.verdicts
    code, _, err = run(*call, "--require", "refusal_rate<=0.5")
    assert code == 3 and "refusal_rate is 1.000, required <= 0.5" in err


def test_evaluations_become_the_report_of_an_adapter(place: Path, run: Run) -> None:
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    for adapter in ("adapter", "out"):
        assert run("evaluate", adapter, "--base", "base", *PROMPTS, *JUDGE, "-o", f"{adapter}.json")[0] == 0
    call = ["report", "out", "--before", "adapter.json", "--after", "out.json"]
    code, out, err = run(*call, "--save", "--html", "page.html", "--plots", "plots", "--json")
    assert code == 0 and json.loads(out)["comparisons"]["refusal_rate"]["n"] == 4, err
    assert SafetyReport.load("out").to_dict() == json.loads(out)
    assert "<html" in (place / "page.html").read_text() and (place / "plots" / "before_after.png").is_file()
    assert "refusal rate" in (place / "out" / "README.md").read_text()
    assert run("verify", "out")[0] == 0
    assert "safety report: unclear" in run("report", "out")[1]


def test_the_report_of_a_named_adapter_goes_into_the_card_above(
    place: Path, run: Run, make_pico_lora: MakeLora
) -> None:
    drift(make_pico_lora(seed=0, adapter_name="mine")).save_pretrained("before")
    model = nlsr_realign(
        drift(make_pico_lora(seed=0, adapter_name="mine")),
        NLSRConfig(update="sum"),
        patch=SafetyPatch.load("patch"),
        progress=False,
    )
    model.save_pretrained("named")
    for folder in ("before/mine", "named/mine"):
        assert run("evaluate", folder, "--base", "base", *PROMPTS, *JUDGE, "-o", f"{folder[:5]}.json")[0] == 0
    code, _, err = run("report", "named/mine", "--before", "befor.json", "--after", "named.json", "--save")
    assert code == 0 and "safety_report.json and the card." in plain(err), err
    assert not (place / "named" / "mine" / "README.md").exists()
    assert "refusal rate" in (place / "named" / "README.md").read_text()
    assert run("verify", "named", "--adapter-name", "mine")[0] == 0


def test_a_card_that_was_left_as_it_is_is_not_said_to_be_written(place: Path, run: Run) -> None:
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    run("evaluate", "out", "--base", "base", *PROMPTS, *JUDGE, "-o", "out.json")
    card = place / "out" / "README.md"
    card.write_text(card.read_text().replace("<!-- nlsr:end -->", ""))
    before = card.read_bytes()
    code, _, err = run("report", "out", "--after", "out.json", "--save")
    assert code == 0 and card.read_bytes() == before
    assert "the card was left as it is" in plain(err) and "and the card" not in plain(err)


def test_evaluations_of_other_weights_are_refused(place: Path, run: Run) -> None:
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    for adapter in ("adapter", "out", "other"):
        assert run("evaluate", adapter, "--base", "base", *PROMPTS, *JUDGE, "-o", f"{adapter}.json")[0] == 0
    assert run("evaluate", "--base", "base", *PROMPTS, *JUDGE, "-o", "base.json")[0] == 0
    before = hashes(place)
    for files, said in {
        ("out", "adapter"): "before out.json is an evaluation of the adapter after the realignment; exchange",
        ("other", "out"): "before other.json is an evaluation of adapter",
        ("adapter", "base"): "after base.json is an evaluation of no adapter that it names",
    }.items():
        call = ["report", "out", "--before", f"{files[0]}.json", "--after", f"{files[1]}.json"]
        for more in ([], ["--save"], ["--html", "page.html"]):
            code, _, err = run(*call, *more)
            assert code == 1 and said in plain(err), err
    assert hashes(place) == before


def test_a_saved_evaluation_of_changed_weights_is_refused(place: Path, run: Run) -> None:
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    run("evaluate", "adapter", "--base", "base", *PROMPTS, *JUDGE, "-o", "before.json")
    shutil.copyfile("adapter/adapter_model.safetensors", "out/adapter_model.safetensors")
    before = hashes(place)
    code, _, err = run("report", "out", "--before", "before.json", "--save")
    assert code == 1 and "not those of its record" in err and hashes(place) == before


def test_an_amplified_reference_is_the_formula(place: Path, run: Run) -> None:
    assert run("reference", "extrapolate", "aligned", "--beta", "0.5", "-o", "amplified")[0] == 0
    strong, made = open_adapter("aligned"), open_adapter("amplified")
    for name in strong:
        expected, found = strong[name], made[name]
        assert torch.allclose(
            1.5 * expected.scale * expected.B @ expected.A, found.scale * found.B @ found.A, atol=1e-5
        )


def test_an_amplified_reference_does_not_claim_what_was_said_of_the_adapter(place: Path, run: Run) -> None:
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    card = place / "out" / "README.md"
    other = "\n<!-- nlsr:begin mine -->\nof another adapter\n<!-- nlsr:end mine -->\n# Mine\n"
    card.write_text(card.read_text() + other)
    assert run("reference", "extrapolate", "out", "--beta", "0.5", "-o", "amplified")[0] == 0
    text = (place / "amplified" / "README.md").read_text()
    assert "# Mine" in text and "nlsr" not in text and "safety-realigned" not in text
    assert not any("nlsr" in path.name for path in (place / "amplified").iterdir())


def test_the_reference_that_messages_ask_for_serves_safelora(place: Path, run: Run) -> None:
    model = LlamaForCausalLM.from_pretrained("base")
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained("instruct")
    modules = [word for name in ("q_proj", "v_proj", "down_proj") for word in ("--module", name)]
    asked = HOW_TO_GET_ONE.rpartition("peft-nlsr ")[2].replace("aligned MODEL", "aligned instruct")
    call = [*asked.replace("base MODEL", "base base").replace("64 -o FOLDER", "4").split(), *modules, "--json"]
    code, out, err = run(*call, "--dry-run")
    assert code == 0 and len(json.loads(out)["modules"]) == 6 and not (place / "reference").exists(), err
    assert run(*call, "-o", "reference")[0] == 0
    safelora = ["--set", "method=safelora", "--set", "selection=all"]
    assert run("realign", "adapter", "--reference", "reference", *safelora, "-o", "out")[0] == 0
    assert run("verify", "out")[0] == 0


def test_inspect_and_audit_say_what_the_library_says(place: Path, run: Run) -> None:
    code, out, _ = run("inspect", "adapter", "--reference", "aligned", "--json")
    assert code == 0 and json.loads(out)["lineage"] == "shared" and len(json.loads(out)["modules"]) == 6
    assert "lineage: independent" in run("inspect", "other", "--reference", "aligned")[1]
    assert re.search(
        r"cosine of the A factors -?0\.\d{3}, 6 of 6 modules unrelated\)",
        run("inspect", "other", "--reference", "aligned")[1],
    )
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    assert "Next: peft-nlsr report out" in run("inspect", "out")[2]
    assert "Next: peft-nlsr realign adapter --base MODEL" in run("inspect", "adapter")[2]
    code, out, _ = run(
        "inspect", "adapter", "--base", "base", "--blocks", *PROMPTS[:2], *PROMPTS[4:], *JUDGE, "--json"
    )
    assert code == 0 and [e["label"] for e in json.loads(out)["blocks"]][1:-1] == ["model.layers.0", "model.layers.1"]
    code, out, _ = run(
        "audit", "train.jsonl", "--base", "base", *JUDGE, "--source", "origin", "--json", "-o", "a.json"
    )
    assert code == 0 and json.loads(out)["refused_rows"] == [3, 7] and json.loads(out)["sources"]["web"]["asked"] == 12
    assert json.loads((place / "a.json").read_text()) == json.loads(out)


def test_compare_takes_methods_with_settings_and_tune_finds_some(place: Path, run: Run) -> None:
    method = "quick:" + ",".join(f"{name}={value}" for name, value in QUICK.items())
    data = ["--utility", "train.jsonl", "--calibration", "calibration.txt", *PROMPTS, *JUDGE, "--json"]
    call = ["adapter", "--base", "base", *data]
    code, out, err = run("compare", *call, "--method", method, "--control", "scaled", "-o", "comparison.json")
    assert code == 0 and len(json.loads(out)["rows"]) == 3, err
    again = "Next: peft-nlsr realign adapter --base base --utility train.jsonl --calibration calibration.txt"
    assert f"{again} -o OUT" in err
    space = ["--space", "utility_weight=0.5,1.0", "--trials", "2", "--searcher", "grid"]
    write_rows(place / "more.jsonl", [{"prompt": f"attack word{i}"} for i in range(20, 36)])
    call[call.index("safety.txt")] = "more.jsonl"
    write_rows(place / "kind.jsonl", [{"prompt": f"vase word{i}"} for i in range(16)])
    call[call.index("benign.txt")] = "kind.jsonl"
    code, out, err = run("tune", *call, *SETS, *space, "-o", "tuned")
    assert code == 0 and len(json.loads(out)["trials"]) == 2, err
    assert f"{again} -c tuned/nlsr_config.json -o OUT" in err
    chosen = json.loads((place / "tuned" / "nlsr_config.json").read_text())["config"]
    assert chosen == json.loads(run("config", "--config", "tuned/nlsr_config.json", "--json")[1])


@pytest.mark.parametrize("preset", ["default", "paper", "released"])
@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_printed_config_is_read_back_as_the_same_settings(place: Path, run: Run, preset: str, form: str) -> None:
    printed = run("config", "--preset", preset, *(["--json"] if form == "json" else []))[1]
    (place / f"settings.{form}").write_text(printed)
    again = json.loads(run("config", "--config", f"settings.{form}", "--json")[1])
    assert again == NLSRConfig.from_preset(preset).to_dict() == {"schema_version": 1, **yaml.safe_load(printed)}


def test_flags_win_over_the_file_and_the_file_over_the_preset(place: Path, run: Run) -> None:
    content = {"preset": "paper", "beta": 0.3, "ridge": "1e-2", "sequential": True, "patch": "patch", "dry-run": True}
    (place / "run.yaml").write_text(yaml.safe_dump(content))
    code, out, err = run("realign", "adapter", "--config", "run.yaml", "--set", "beta=0.4", "--json")
    assert code == 0 and json.loads(out)["preset"] == "paper, 3 settings changed", err
    (place / "settings.yaml").write_text(yaml.safe_dump({k: content[k] for k in ("preset", "beta", "ridge")}))
    found = json.loads(run("config", "-c", "settings.yaml", "--set", "beta=0.4", "--json")[1])
    assert (found["beta"], found["ridge"], found["selection"]) == (0.4, 0.01, "bernoulli")
    assert json.loads(run("config", "-c", "settings.yaml", "--preset", "paper", "--json")[1])["beta"] == 0.3
    for other in (["--preset", "released"], ["--set", "preset=default"]):
        code, _, err = run("config", "-c", "settings.yaml", *other)
        assert code == 2 and "the settings file is of preset paper, not" in plain(err)


def test_a_push_preview_minds_an_edited_card_as_little_as_the_push_does(place: Path, run: Run) -> None:
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    card = place / "out" / "README.md"
    card.write_text(card.read_text().replace("### What was changed", "### What was not changed"))
    assert run("verify", "out")[0] == 3
    code, _, err = run("push", "out", "me/adapter", "--dry-run")
    assert code == 0 and err.startswith("The card would be written anew"), err


def test_the_table_of_settings_has_every_field(run: Run) -> None:
    out = plain(run("config", "--explain")[1])
    assert [name for name in NLSRConfig().to_dict() if name != "schema_version" and name not in out] == []


def test_dry_runs_write_nothing(place: Path, run: Run) -> None:
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    calls = [
        ["patch", "build", "aligned", "--set", "score=magnitude"],
        ["reference", "extrapolate", "aligned"],
        ["revert", "out"],
        ["push", "out", "me/adapter"],
        ["tune", "adapter", "--base", "base"],
        ["calibrate", "aligned", "--base", "base", "--calibration", "calibration.txt", *JUDGE, *SETS],
        ["realign", "adapter", "--base", "base", "--utility", "train.jsonl", *JUDGE, *SETS],
    ]
    before = hashes(place)
    for call in calls:
        code, out, err = run(*call, "--dry-run")
        assert code == 0 and out and "dry run" in err, err
    assert {k: v for k, v in hashes(place).items() if "__pycache__" not in k} == {
        k: v for k, v in before.items() if "__pycache__" not in k
    }


def test_completion_offers_settings_and_presets() -> None:
    from peft_nlsr.cli.options import _complete_preset, _complete_setting

    assert [name for name, _ in _complete_setting("utility_w")] == ["utility_weight="]
    assert _complete_preset("p") == ["paper"]


def test_the_studys_page_shows_every_method_and_loads_nothing() -> None:
    from peft_nlsr.cli.demo import study_page

    report = json.loads((ROOT / "benchmarks" / "results" / "lab" / "lab_report.json").read_text())
    page = study_page(report)
    assert [row["method"] for row in report["summary"] if row["method"] not in page] == []
    assert not re.search(r"(src|href)=|https?://", page)
    scrolling = re.findall(r'<div class="scroll"([^>]*)>', page)
    assert len(scrolling) == page.count("<table>") == 4
    assert all(re.fullmatch(r' role="region" aria-label="[^"]+ lineage" tabindex="0"', found) for found in scrolling)


def test_the_version_is_printed(run: Run) -> None:
    import peft_nlsr

    assert run("--version") == (0, f"{peft_nlsr.__version__}\n", "")
