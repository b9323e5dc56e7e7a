"""The command: data on stdout, all else on stderr, and a failure is one sentence."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import drift, factors_of, hashes

from peft_nlsr import NLSRConfig, Reference, __main__, cli, realign_folder
from peft_nlsr.nlsr import build_nlsr_patch

MakeLora = Callable[..., PeftModel]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def place(tmp_path: Path, make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with ``adapter``, ``patch`` and ``other``, an adapter of another lineage."""
    drift(make_pico_lora(seed=0)).save_pretrained(tmp_path / "adapter")
    make_pico_lora(seed=5).save_pretrained(tmp_path / "other")
    reference = Reference("adapter", factors_of(make_pico_lora(seed=0)), "the aligned adapter")
    build_nlsr_patch(reference, None, NLSRConfig(score="magnitude")).save(tmp_path / "patch")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``peft-nlsr`` in this process: exit code, stdout, stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-nlsr", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        return (code if isinstance(code, int) else int(bool(code)), *capsys.readouterr())

    return command


def plain(text: str) -> str:
    """Without colours, boxes and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


@pytest.mark.parametrize("command", [[], ["realign"], ["revert"], ["demo"]], ids=lambda c: " ".join(c) or "top")
def test_help_goes_to_stdout_and_names_the_options(run: Any, command: list[str]) -> None:
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "") and "Usage: peft-nlsr" in plain(out)
    expected = {
        "": ["realign", "revert", "demo", "without training"],
        "realign": ["--patch", "--output", "--dry-run", "--json", "--preset", "default, paper or released", "Example"],
        "revert": ["--output", "bit for bit"],
        "demo": ["--seeds", "--full", "--json"],
    }[" ".join(command)]
    assert [word for word in expected if word not in plain(out)] == []


def test_no_command_shows_the_help(run: Any) -> None:
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


def test_realign_writes_the_folder_and_says_how_to_undo_it(place: Path, run: Any) -> None:
    before = hashes(place)
    code, out, err = run("realign", "adapter", "--patch", "patch", "-o", "out")
    assert code == 0
    assert out.startswith("sum (a patch and adapter files); preset default\nreference: the aligned adapter\n3 of 6")
    assert err == "Wrote out. Undo: peft-nlsr revert out -o ORIGINAL\n"
    realign_folder(place / "adapter", place / "expected", patch=place / "patch")
    assert hashes(place / "out") == hashes(place / "expected")
    after = hashes(place)
    assert {path: after[path] for path in before} == before


def test_json_on_stdout_is_the_record_and_notes_go_to_stderr(place: Path, run: Any) -> None:
    code, out, err = run("realign", "adapter", "--patch", "patch", "--output", "out", "--preset", "released", "--json")
    assert code == 0 and json.loads(out) == json.loads((place / "out" / "nlsr_config.json").read_text())["record"]
    assert json.loads(out)["preset"] == "released" and json.loads(out)["method"] == "swap"
    assert err.startswith("Wrote out.")


@pytest.mark.parametrize("output", [[], ["-o", "out"]], ids=["no-output", "output-ignored"])
def test_a_dry_run_reports_and_writes_nothing(place: Path, run: Any, output: list[str]) -> None:
    before = hashes(place)
    code, out, err = run("realign", "adapter", "--patch", "patch", "--dry-run", "--json", *output)
    assert (code, err) == (0, "") and json.loads(out)["fingerprint_after"] is None
    code, out, err = run("realign", "adapter", "--patch", "patch", "--dry-run", *output)
    assert (code, err) == (0, "") and "3 of 6 modules changed" in out
    assert hashes(place) == before


def test_revert_gives_the_original_back(place: Path, run: Any) -> None:
    run("realign", "adapter", "--patch", "patch", "-o", "out")
    code, out, err = run("revert", "out", "-o", "back")
    assert (code, out) == (0, "") and err.startswith("Wrote back: the adapter as it was")
    assert hashes(place / "back") == hashes(place / "adapter")


def test_no_diff_leaves_the_diff_out(place: Path, run: Any) -> None:
    assert run("realign", "adapter", "--patch", "patch", "-o", "out", "--no-diff")[0] == 0
    assert not (place / "out" / "nlsr_diff.safetensors").exists()


def test_paths_are_printed_as_they_are(place: Path, run: Any) -> None:
    name = "[red]" + "long-name-" * 15
    code, _, err = run("realign", "adapter", "--patch", "patch", "-o", name)
    assert code == 0 and err == f"Wrote {name}. Undo: peft-nlsr revert {name} -o ORIGINAL\n"


FAILURES: dict[str, tuple[list[str], str]] = {
    "no-such-adapter": (
        ["realign", "nowhere", "--patch", "patch", "-o", "new"],
        "'nowhere' is not an existing folder",
    ),
    "no-such-path": (
        ["realign", "/no/where", "--patch", "patch", "-o", "new"],
        "neither an existing folder nor a Hub id",
    ),
    "folder-without-adapter": (["realign", "patch", "--patch", "patch", "-o", "new"], "no adapter_config.json"),
    "no-such-patch": (["realign", "adapter", "--patch", "nowhere", "-o", "new"], "no safety patch at 'nowhere'"),
    "patch-is-an-adapter": (["realign", "adapter", "--patch", "adapter", "-o", "new"], "adapter is no safety patch"),
    "other-lineage": (["realign", "other", "--patch", "patch", "-o", "new"], "not trained from the reference"),
    "output-exists": (["realign", "adapter", "--patch", "patch", "-o", "other"], "other exists and is not an empty"),
    "output-is-input": (["realign", "adapter", "--patch", "patch", "-o", "adapter"], "adapter exists"),
    "output-inside-input": (["realign", "adapter", "--patch", "patch", "-o", "adapter/new"], "inside the input"),
    "output-is-a-file": (["realign", "adapter", "--patch", "patch", "-o", "patch/safety_patch.json"], "exists"),
    "unknown-preset": (
        ["realign", "adapter", "--patch", "patch", "-o", "new", "--preset", "papr"],
        "'papr' is not one of default, paper, released",
    ),
    "never-realigned": (["revert", "adapter", "-o", "new"], "cannot be reverted: it has no nlsr_config.json"),
    "revert-nowhere": (["revert", "nowhere", "-o", "new"], "no adapter_config.json"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_one_sentence_on_stderr(place: Path, run: Any, failure: str) -> None:
    arguments, words = FAILURES[failure]
    before = hashes(place)
    code, out, err = run(*arguments)
    assert (code, out) == (1, "") and words in err
    assert err.startswith("Error: ") and "Traceback" not in err
    assert hashes(place) == before and sorted(p.name for p in place.iterdir()) == ["adapter", "other", "patch"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["realign", "adapter", "--patch", "patch"], "give --output FOLDER, or --dry-run", id="no-output"),
        pytest.param(["realign", "adapter", "-o", "new"], "Missing option '--patch'", id="no-patch"),
        pytest.param(["realign"], "Missing argument 'ADAPTER'", id="no-adapter"),
        pytest.param(["revert", "adapter"], "Missing option '--output'", id="revert-without-output"),
        pytest.param(["realing"], "No such command 'realing'", id="unknown-command"),
        pytest.param(["realign", "adapter", "--pach", "x"], "No such option: --pach", id="unknown-option"),
        pytest.param(["demo", "--seeds", "0"], "Invalid value for '--seeds'", id="demo-without-a-seed"),
        pytest.param(["demo", "--poison", "1.5"], "Invalid value for '--poison'", id="demo-all-poison-and-more"),
    ],
)
def test_a_wrong_call_is_a_usage_error(place: Path, run: Any, arguments: list[str], words: str) -> None:
    before = hashes(place)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert words.replace(" ", "").lower() in plain(err).replace(" ", "").lower()
    assert hashes(place) == before


def test_ctrl_c_leaves_no_files_and_no_traceback(place: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_nlsr import folders

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = hashes(place)
    monkeypatch.setattr(folders, "restore", interrupted)
    code, out, err = run("realign", "adapter", "--patch", "patch", "-o", "out")
    assert code not in (0, None) and out == "" and "Traceback" not in err
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
