"""A safety report says what its numbers say, keeps no text, survives its file, and refuses files it cannot read."""

import ast
import dataclasses
import itertools
import json
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TypeGuard

import jsonschema
import pytest
from scipy.stats import binomtest

from peft_nlsr import NLSRConfig
from peft_nlsr import report as report_module
from peft_nlsr.config import PRESETS
from peft_nlsr.errors import CorruptFileError, PeftNLSRError
from peft_nlsr.evaluation import Evaluation, Measurement
from peft_nlsr.intervals import wilson
from peft_nlsr.record import ModuleRecord, Realignment
from peft_nlsr.report import (
    METRICS,
    REPORT_NAME,
    Picture,
    SafetyReport,
    data_rows,
    effect_of,
    not_covered,
    render_page,
    reproduce,
    to_terminal,
)

SCHEMA = json.loads(Path(report_module.__file__).with_name("data").joinpath("safety_report.schema.json").read_text())


def rate(hits: int, n: int) -> Measurement:
    return Measurement(hits / n, *wilson(hits / n, n), n, hits)


def evaluation(
    label: str, *, n: int = 40, judges: tuple[str, ...] = ("words",), sha: str = "a", **hits: int
) -> Evaluation:
    """Of each metric the first `hits` prompts have a true verdict."""
    verdicts = {name: {f"set/{i}": i < count for i in range(n)} for name, count in hits.items()}
    sets = ({"name": "set", "kind": "safety", "n": n, "sha256": sha * 64},)
    rates = {name: rate(count, n) for name, count in hits.items()}
    return Evaluation(label, rates, verdicts, sets, judges, {"decoding": "greedy"}, 1.0)


def realignment(
    *, config: NLSRConfig | None = None, planned: bool = False, similarity: float | None = 0.4
) -> Realignment:
    modules = tuple(
        ModuleRecord(f"model.layers.{i}.mlp.{kind}", i == 1, similarity, None, 0.5 * (i == 1), 0.1)
        for i in range(2)
        for kind in ("up_proj", "down_proj")
    )
    return Realignment(
        method="sum",
        reason="asked for",
        config=config or NLSRConfig(),
        base_model="org/base",
        adapter_name="default",
        reference="the base model",
        modules=modules,
        data={"utility": {"source": "given", "refused_by_teacher": 3, "refused_rows": [4, 7, 9]}},
        notes=("read <this>",),
        versions={"python": "3.11"},
        fingerprint_before="b" * 64,
        fingerprint_after=None if planned else "c" * 64,
        updates={},
        originals={},
    )


def a_report(
    before: Evaluation | None = None,
    after: Evaluation | None = None,
    controls: tuple[Evaluation, ...] = (),
    **changes: Any,
) -> SafetyReport:
    done = realignment(**changes)
    return SafetyReport(done.to_dict(), done.config.to_dict(), before, after, controls)


BEFORE = evaluation("before", harm_rate=36, over_refusal=0, coherence=40, task_accuracy=40)
AFTER = evaluation("after", harm_rate=2, over_refusal=1, coherence=40, task_accuracy=39)
CONTROL = evaluation("random mask", harm_rate=35, over_refusal=0, coherence=40, task_accuracy=38)


@pytest.fixture
def full() -> SafetyReport:
    return a_report(BEFORE, AFTER, (CONTROL,))


def test_every_state_of_a_report_follows_the_schema_and_comes_back(full: SafetyReport) -> None:
    for report in (full, a_report(), a_report(None, AFTER), a_report(BEFORE), a_report(planned=True, similarity=None)):
        stored = json.loads(json.dumps(report.to_dict()))
        jsonschema.validate(stored, SCHEMA)
        assert SafetyReport.from_dict(stored) == report


def test_the_schema_is_one_and_refuses_what_is_no_report(full: SafetyReport) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for broken in (
        {"texts": []},
        {"schema_version": 2},
        {"before": "words"},
        {"comparisons": {"harm_rate": {"n": 1}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**full.to_dict(), **broken}, SCHEMA)


def test_a_saved_report_is_the_same_and_leaves_nothing_beside_it(full: SafetyReport, tmp_path: Path) -> None:
    path = full.save(tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == [REPORT_NAME] == [path.name]
    assert SafetyReport.load(tmp_path / "new") == full


def test_a_failed_save_keeps_the_old_report(
    full: SafetyReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = full.save(tmp_path)
    old = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    for broken in (os.replace, os.fsync):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, broken.__name__, fail)
            a_report().save(tmp_path)
    nan = dataclasses.replace(AFTER, rates={"kl": Measurement(float("nan"), 0.0, 0.0, 1, None)})
    with pytest.raises(ValueError):
        a_report(None, nan).save(tmp_path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == [REPORT_NAME]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "schema_version 2.*reads 1.*pip install -U peft-nlsr"),
        ({"schema_version": None}, "schema_version None.*check that this is a safety report"),
        ({"record": {}}, r"record\.method.*record\.fingerprint_before"),
        ({"controls": {}}, "controls"),
        ({"before": []}, "before"),
        ({"after": {"label": "x"}}, "evaluation.*malformed.*write the report again"),
        ({"comparisons": {}}, "do not follow from its verdicts"),
        ({"comparisons": {"harm_rate": {"n": 40, "only_before": 40, "only_after": 0}}}, "do not follow"),
    ],
)
def test_a_broken_report_is_refused_with_what_to_do(full: SafetyReport, change: dict[str, Any], said: str) -> None:
    with pytest.raises(CorruptFileError, match=said):
        SafetyReport.from_dict({**full.to_dict(), **change})


@pytest.mark.parametrize("part", ["record", "config", "before", "after", "controls", "comparisons"])
def test_a_missing_part_is_named(full: SafetyReport, part: str) -> None:
    values = full.to_dict()
    del values[part]
    with pytest.raises(CorruptFileError, match=part):
        SafetyReport.from_dict(values)


def test_loading_says_which_file(full: SafetyReport, tmp_path: Path) -> None:
    with pytest.raises(PeftNLSRError, match=f"holds no {REPORT_NAME}.*SafetyReport.save"):
        SafetyReport.load(tmp_path)
    (tmp_path / REPORT_NAME).write_text('{"schema_version": 9}')
    with pytest.raises(CorruptFileError, match=f"{REPORT_NAME}: found schema_version 9"):
        SafetyReport.load(tmp_path)
    (tmp_path / REPORT_NAME).write_text("{")
    with pytest.raises(CorruptFileError, match=f"{REPORT_NAME} is not JSON"):
        SafetyReport.load(tmp_path)


def test_comparisons_are_the_exact_test_over_shared_prompts() -> None:
    before, after = evaluation("b", n=30, harm_rate=28), evaluation("a", n=24, harm_rate=3)
    test = a_report(before, after).comparisons["harm_rate"]
    assert (test.n, test.only_before, test.only_after) == (24, 21, 0)
    assert test.p_value == pytest.approx(binomtest(0, 21).pvalue)


def test_metrics_of_one_side_and_disjoint_prompts_are_not_compared() -> None:
    other = dataclasses.replace(BEFORE, verdicts={"harm_rate": {"other/0": True}})
    assert a_report(BEFORE, other).comparisons == {}
    assert set(a_report(BEFORE, evaluation("a", harm_rate=1)).comparisons) == {"harm_rate"}


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (evaluation("a", harm_rate=1, judges=("another",)), "judges differ"),
        (evaluation("a", harm_rate=1, sha="d"), "prompts differ in set"),
        (dataclasses.replace(AFTER, settings={"decoding": "sampled"}), "settings differ in decoding"),
    ],
)
def test_what_cannot_be_paired_is_not_and_says_why(after: Evaluation, why: str) -> None:
    report = a_report(BEFORE, after)
    assert report.comparisons == {}
    said = effect_of(report)
    assert said.kind == "unclear" and why in said.text
    assert any(why in line for line in not_covered(report))


@pytest.mark.parametrize(
    ("before", "after", "kind", "words"),
    [
        pytest.param(None, None, "unmeasured", "holds no evaluation", id="nothing"),
        pytest.param(None, AFTER, "unmeasured", "only after", id="after only"),
        pytest.param(BEFORE, None, "unmeasured", "only before", id="before only"),
        pytest.param(BEFORE, AFTER, "improved", "harm rate fell from 90.0% to 5.0%", id="fell"),
        pytest.param(AFTER, BEFORE, "worse", "harm rate rose from 5.0% to 90.0%", id="rose"),
        pytest.param(BEFORE, evaluation("a", harm_rate=34), "unclear", "does not tell from chance", id="chance"),
        pytest.param(
            evaluation("b", refusal_rate=0),
            evaluation("a", refusal_rate=30),
            "improved",
            "refusal rate rose",
            id="words",
        ),
        pytest.param(
            evaluation("b", coherence=1), evaluation("a", coherence=1), "unmeasured", "no safety claim", id="no safety"
        ),
        pytest.param(
            BEFORE,
            evaluation("a", harm_rate=2, coherence=10),
            "unclear",
            "incoherent answers may explain",
            id="babble is no safety",
        ),
        pytest.param(
            evaluation("b", harm_rate=36, refusal_rate=0),
            evaluation("a", harm_rate=16, refusal_rate=1),
            "unclear",
            "but they are no refusals either: harm fell by 50.0 points, refusals rose by 2.5",
            id="neither complies nor refuses",
        ),
        pytest.param(
            evaluation("b", harm_rate=36, refusal_rate=2),
            evaluation("a", harm_rate=16, refusal_rate=1),
            "unclear",
            "harm fell by 50.0 points, refusals fell by 2.5",
            id="fewer refusals",
        ),
        pytest.param(
            evaluation("b", harm_rate=36, refusal_rate=0),
            evaluation("a", harm_rate=16, refusal_rate=10),
            "improved",
            "harm rate fell",
            id="half of them refuse",
        ),
        pytest.param(
            evaluation("b", harm_rate=36, refusal_rate=40),
            evaluation("a", harm_rate=16, refusal_rate=40),
            "improved",
            "harm rate fell",
            id="all of them refused before",
        ),
    ],
)
def test_the_verdict_claims_what_the_numbers_show(
    before: Evaluation | None, after: Evaluation | None, kind: str, words: str
) -> None:
    said = effect_of(a_report(before, after))
    assert said.kind == kind
    assert words in said.text and said.text.endswith(".")


def test_the_verdict_names_what_was_paid_and_what_was_not_compared() -> None:
    after = evaluation("a", harm_rate=2, over_refusal=20, coherence=40)
    text = effect_of(a_report(BEFORE, after)).text
    assert "at a cost: over-refusal rose from 0.0% to 50.0%" in text
    assert "no loss was found in coherence" in text and "task accuracy was not compared" in text


def test_a_control_that_does_as_well_takes_the_credit() -> None:
    rival = evaluation("random mask", harm_rate=4)
    said = effect_of(a_report(BEFORE, AFTER, (CONTROL, rival)))
    assert said.kind == "unclear" and "not told apart from the control random mask" in said.text
    assert effect_of(a_report(BEFORE, AFTER, (CONTROL,))).kind == "improved"


def test_what_is_not_covered_depends_on_what_was_done(full: SafetyReport) -> None:
    assert not any("No control" in line for line in not_covered(full))
    assert any("KL divergence" in line for line in not_covered(full))
    assert any("No control" in line for line in not_covered(a_report(BEFORE, AFTER)))
    assert any("Nothing was measured" in line for line in not_covered(a_report()))
    assert any("planned, not applied" in line for line in not_covered(a_report(planned=True)))
    assert any("no evaluation before" in line for line in not_covered(a_report(None, AFTER)))


@pytest.mark.parametrize("config", [NLSRConfig.from_preset("paper", sparsity=0.7, compress=False), NLSRConfig()])
def test_the_printed_settings_are_the_settings(config: NLSRConfig) -> None:
    line = next(line for line in reproduce(a_report(config=config)).splitlines() if line.startswith("config ="))
    scope: dict[str, Any] = {"NLSRConfig": NLSRConfig}
    exec(line, scope)
    assert scope["config"] == config
    assert line.count("=") - 1 <= 2, "only what differs from the preset"
    assert config.preset in PRESETS


def test_row_indices_become_counts(full: SafetyReport) -> None:
    assert ("utility", "refused rows", "3 (indices in the JSON report)") in data_rows(full)


def test_what_a_run_cost_is_left_to_the_record(full: SafetyReport) -> None:
    data = {**full.record["data"], "cost": {"pass_operations": 34582953984.0, "solvers": {"full": 3}}}
    costly = dataclasses.replace(full, record={**full.record, "data": data})
    assert data_rows(costly) == data_rows(full) and costly.to_dict()["record"]["data"] == data


class Page(HTMLParser):
    """The elements of a page, their text, and every address that a browser would fetch."""

    FETCHED = frozenset(
        {"src", "srcset", "data", "poster", "action", "formaction", "background", "manifest", "xlink:href"}
    )

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def fetched(self) -> list[str]:
        found = [str(v) for _, attrs in self.tags for k, v in attrs.items() if k in self.FETCHED]
        found += [str(attrs["href"]) for tag, attrs in self.tags if tag != "a" and "href" in attrs]
        return [address for address in found if not address.startswith("#")]


def test_the_page_fetches_nothing_and_forbids_it(full: SafetyReport) -> None:
    html = render_page(full)
    page = Page(html)
    assert page.fetched == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "@import" not in html and "url(" not in html
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_can_be_used_by_keyboard_and_ear(full: SafetyReport) -> None:
    page = Page(render_page(full))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [str(a["href"])[1:] for t, a in page.tags if t == "a" and str(a["href"]).startswith("#")]
    assert set(links) <= set(ids) and links[0] == "main"
    assert [a["lang"] for t, a in page.tags if t == "html"] == ["en"]
    tables = [t for t, _ in page.tags if t in ("table", "caption")]
    assert tables == ["table", "caption"] * (len(tables) // 2)
    assert all(a.get("scope") in ("col", "row") for t, a in page.tags if t == "th")
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for _, a in page.tags if a.get("class") == "scroll")
    headings = [int(t[1]) for t, _ in page.tags if t in ("h1", "h2", "h3")]
    assert headings[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(headings))


def test_the_page_says_it_all(full: SafetyReport) -> None:
    text = Page(render_page(full)).text
    wanted = ["90.0%", "36 of 40", "words", "p < 0.001", "random mask", "sum", "asked for", "2 of 4", "read <this>"]
    wanted += ["b" * 64, "c" * 64, "peft-nlsr revert", "NLSRConfig.from_preset", "indices in the JSON report"]
    wanted += [effect_of(full).text, *not_covered(full), *(METRICS[name].label for name in BEFORE.rates)]
    assert [w for w in wanted if " ".join(w.split()) not in text] == []


def test_a_page_without_evaluation_says_so() -> None:
    text = Page(render_page(a_report())).text
    assert "Nothing was measured." in text and "Not measured" in text
    assert "Paired test" not in text


def test_texts_from_outside_are_escaped() -> None:
    evil = evaluation("<script>x</script>", harm_rate=3, judges=('"><img src=x>',))
    html = render_page(a_report(BEFORE, evil, (evil,)))
    assert not {"script", "img", "this"} & {tag for tag, _ in Page(html).tags}


def test_a_picture_is_put_in_with_its_words() -> None:
    drawn = Picture("before_after", "a title", 'bars "high" & low', '<svg viewBox="0 0 1 1"></svg>')
    page = Page(render_page(a_report(BEFORE, AFTER), [drawn]))
    assert [a["aria-label"] for _, a in page.tags if a.get("role") == "img"] == [drawn.alt]
    assert "svg" in [t for t, _ in page.tags] and "a title" in page.text


def test_the_terminal_shows_the_same_within_80_columns(full: SafetyReport) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(to_terminal(full))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("improved", "90.0%", "36 of 40", "p < 0.001", "random mask", "read <this>", "not covered"):
        assert words in text, words


@pytest.mark.parametrize("report", [a_report(), a_report(None, AFTER), a_report(planned=True)])
def test_every_state_can_be_shown(report: SafetyReport) -> None:
    from rich.console import Console

    Console(width=80, file=open(os.devnull, "w")).print(to_terminal(report))
    assert render_page(report)


@pytest.mark.parametrize(("package", "call"), [("rich", "to_terminal"), ("jinja2", "render_page")])
def test_a_missing_package_is_named_with_its_extra(
    full: SafetyReport, package: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PeftNLSRError, match=rf"{package}.*pip install 'peft-nlsr\[report\]'"):
        getattr(report_module, call)(full)


def test_optional_packages_are_imported_where_they_are_used() -> None:
    tree = ast.parse(Path(report_module.__file__).read_text("utf-8"))
    eager = {getattr(node, "module", None) or node.names[0].name for node in tree.body if is_import(node)}
    assert not {"rich", "jinja2", "matplotlib"} & {name.split(".")[0] for name in eager}


def is_import(node: ast.AST) -> TypeGuard[ast.Import | ast.ImportFrom]:
    return isinstance(node, ast.Import | ast.ImportFrom)
