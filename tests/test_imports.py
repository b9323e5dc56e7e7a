"""Imports go from higher to strictly lower levels; a new file must be given a level here.

Every import statement counts: at the top, in a function, under TYPE_CHECKING, relative or absolute.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "peft_nlsr"
ROOT = Path(__file__).parent.parent / PACKAGE
LEVELS = {
    **dict.fromkeys(["errors", "defaults", "lowrank", "prompts", "judges", "intervals"], 0),
    **dict.fromkeys(["files", "hub", "prompt_sets", "answer_file", "processes", "offloading"], 1),
    **dict.fromkeys(["config", "result_file", "ranks"], 2),
    **dict.fromkeys(["scores", "selection", "storage", "examples"], 3),
    **dict.fromkeys(["costs", "adapters", "generation", "divergence"], 4),
    **dict.fromkeys(["live_adapter", "directions"], 5),
    **dict.fromkeys(["adapter_folder", "edits"], 6),
    **dict.fromkeys(["blocks", "solvers", "resuming", "patch", "reference", "record"], 7),
    **dict.fromkeys(["evaluation", "judging", "checkpoints"], 7),
    **dict.fromkeys(["gradients", "screening", "streams", "report", "projection", "measuring"], 8),
    **dict.fromkeys(["calibration", "two_teacher", "plots", "card", "eval_results"], 9),
    **dict.fromkeys(["nlsr", "fgsn", "safelora", "baselines", "claims", "summing"], 10),
    "registration": 11,
    **dict.fromkeys(["applying", "folders", "building"], 12),
    "realign": 13,
    **dict.fromkeys(["distributed", "gate", "planning", "inspection", "publishing", "verification"], 14),
    **dict.fromkeys(["controls", "callback"], 15),
    **dict.fromkeys(["comparison", "tuning"], 16),
    "__init__": 17,
    "lab": 18,  # stands for every file of the lab, which sees the package as a user does
    "cli": 19,  # stands for every file of the command line; above the lab, because it offers the lab's demo
    "__main__": 20,
}
LIGHT = [
    "config",
    "errors",
    "defaults",
    "files",
    "lowrank",
    "prompts",
    "judges",
    "scores",
    "selection",
    "storage",
    "examples",
    "costs",
    "directions",
    "edits",
]
HEAVY = ("peft", "transformers")
SUBPACKAGES = ("lab", "cli")


def listed_as(name: str) -> str:
    """The key of LEVELS that the file with this dotted name goes by."""
    top = name.split(".")[0]
    return top if top in SUBPACKAGES else name


def files_on_disk() -> dict[str, Path]:
    """The package's python files by dotted name, `lab/world.py` being `lab.world`."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def imported_files(name: str, source: str) -> Iterator[tuple[str, bool]]:
    """The keys of LEVELS that `name` imports, each with whether the import runs as soon as `name` is imported."""
    tree = ast.parse(source)
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        eager = id(node) not in inside_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield as_listed(alias.name.split(".")[1:]), eager
        elif isinstance(node, ast.ImportFrom):
            module = absolute_module(name, node)
            if module[:1] != [PACKAGE]:
                continue
            for alias in node.names:
                if module == [PACKAGE] and alias.name == "__version__":
                    continue  # a plain constant of the package: no arrow to anything it exports
                yield as_listed([*module[1:], alias.name]), eager


def absolute_module(name: str, node: ast.ImportFrom) -> list[str]:
    """The dotted parts of the module that `node` imports from, relative dots resolved."""
    module = node.module.split(".") if node.module else []
    if node.level == 0:
        return module
    parents = [PACKAGE, *name.split(".")]
    return parents[: len(parents) - node.level] + module


def as_listed(parts: list[str]) -> str:
    """The key of LEVELS for `peft_nlsr.<parts>`: the file it names, else `__init__`, which holds the public names."""
    return parts[0] if parts and parts[0] in LEVELS else "__init__"


def forbidden_arrows(name: str, source: str) -> list[str]:
    """The imports of `name` that break a rule, in words."""
    here = listed_as(name)
    return [
        f"{name} (level {LEVELS[here]}) imports {target} (level {LEVELS[target]}): {rule}"
        for target, eager in dict.fromkeys(imported_files(name, source))
        if (rule := broken_rule(here, target, eager=eager))
    ]


def broken_rule(here: str, target: str, *, eager: bool) -> str | None:
    """The rule that the arrow from `here` to `target` breaks, or None."""
    if here == target and here in SUBPACKAGES:
        return None
    if LEVELS[target] >= LEVELS[here]:
        return "imports go to strictly lower levels"
    if here == "lab" and target != "__init__":
        return "the lab uses only the public API, `from peft_nlsr import ...`"
    if target == "lab" and eager:
        return "the lab is imported inside a function"
    return None


def heavy_imports(source: str) -> list[str]:
    """The imports of `peft` or `transformers` in `source`, wherever they stand."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.append(node.module or "")
    return [module for module in modules if module.split(".")[0] in HEAVY]


def test_every_file_has_a_level() -> None:
    unlisted = {listed_as(name) for name in files_on_disk()} - set(LEVELS)
    assert not unlisted, "give each new file a level in tests/test_imports.py"


@pytest.mark.parametrize("name", [name for name in files_on_disk() if listed_as(name) in LEVELS])
def test_imports_go_down(name: str) -> None:
    assert forbidden_arrows(name, files_on_disk()[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", [name for name in files_on_disk() if name in LIGHT])
def test_low_levels_name_neither_peft_nor_transformers(name: str) -> None:
    assert heavy_imports(files_on_disk()[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", [name for name in files_on_disk() if name in LIGHT])
def test_low_levels_load_neither_peft_nor_transformers(name: str) -> None:
    program = f"import sys, {PACKAGE}.{name}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("name", "source"),
    [
        pytest.param("scores", "from .realign import realign", id="upward, relative"),
        pytest.param("scores", "from peft_nlsr.realign import realign", id="upward, absolute"),
        pytest.param("scores", "import peft_nlsr.realign", id="upward, plain import"),
        pytest.param("scores", "import peft_nlsr.realign as r", id="upward, renamed"),
        pytest.param("scores", "from . import realign", id="upward, module from the package"),
        pytest.param("scores", "from peft_nlsr import nlsr_realign", id="upward, public name"),
        pytest.param("scores", "from . import *", id="upward, star"),
        pytest.param("scores", "def f():\n    from .realign import realign", id="upward, in a function"),
        pytest.param("scores", "if TYPE_CHECKING:\n    from .realign import realign", id="upward, for types"),
        pytest.param("scores", "from .selection import select", id="sideways"),
        pytest.param("folders", "from .realign import plan", id="sideways, higher up"),
        pytest.param("realign", "def f():\n    from .lab.world import World", id="library to lab"),
        pytest.param("__init__", "def f():\n    from .lab import demo", id="package to lab"),
        pytest.param("lab.world", "from ..realign import realign", id="lab to a private module"),
        pytest.param("lab.world", "from peft_nlsr import realign", id="lab to a private module, absolute"),
        pytest.param("lab.world", "def f():\n    from ..cli import main", id="lab to command line"),
        pytest.param("cli", "from .lab import demo", id="command line to lab, eager"),
        pytest.param("cli.demo", "from ..lab import demo", id="file of the command line to lab, eager"),
        pytest.param("callback", "from .cli.options import say", id="library to command line"),
    ],
)
def test_a_forbidden_arrow_is_found(name: str, source: str) -> None:
    assert len(forbidden_arrows(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        pytest.param("scores", "from .lowrank import LowRank", id="down"),
        pytest.param("cli", "from .config import NLSRConfig", id="down, many levels"),
        pytest.param("record", "from . import __version__", id="version"),
        pytest.param("scores", "import torch\nfrom json import dumps", id="other packages"),
        pytest.param("lab.world", "from peft_nlsr import nlsr_realign", id="lab to public name"),
        pytest.param("lab.world", "from .. import nlsr_realign", id="lab to public name, relative"),
        pytest.param("lab.pipeline", "from .world import World", id="inside the lab"),
        pytest.param("lab.__init__", "from .pipeline import demo", id="inside the lab, its package file"),
        pytest.param("cli", "def f():\n    from .lab import demo", id="command line to lab, lazy"),
        pytest.param("cli.demo", "def f():\n    from ..lab import demo", id="file of the command line to lab, lazy"),
        pytest.param("cli.repair", "from .options import say", id="inside the command line"),
        pytest.param("cli.__init__", "from .repair import realign", id="inside the command line, its package file"),
    ],
)
def test_an_allowed_arrow_passes(name: str, source: str) -> None:
    assert forbidden_arrows(name, source) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import peft.tuners", ["peft.tuners"]),
        ("def f():\n    from transformers import Trainer", ["transformers"]),
        ("import peft_nlsr.lowrank\nimport torch", []),
        ("from .peft import x", []),
    ],
)
def test_heavy_imports_are_found(source: str, found: list[str]) -> None:
    assert heavy_imports(source) == found
