"""The pictures show the report's numbers, are the same every time, leave matplotlib as it was, and load nothing."""

import dataclasses
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest

from peft_nlsr.card import PICTURE_FILES
from peft_nlsr.errors import PeftNLSRError
from peft_nlsr.evaluation import Evaluation, Measurement
from peft_nlsr.intervals import wilson
from peft_nlsr.plots import (
    INK,
    before_after,
    change_norms,
    pareto,
    pictures,
    save_plots,
    similarity_map,
    to_html,
)
from peft_nlsr.report import Picture, SafetyReport

NAMES = ("q_proj", "v_proj", "down_proj")


def module(name: str, *, similarity: float | None = 0.5, change: float | None = 0.0) -> dict[str, Any]:
    restored = change is None or change > 0.0
    return {
        "module": name,
        "restored": restored,
        "similarity": similarity,
        "probability": None,
        "relative_change": change,
        "truncation_error": 0.0,
    }


def modules(layers: int, *, similar: bool = True) -> list[dict[str, Any]]:
    """Similarity and change grow with the layer; every other module is left alone."""
    return [
        module(
            f"model.layers.{i}.self_attn.{kind}",
            similarity=(3 * i + j) / (3 * layers) if similar else None,
            change=(i + 1.0) * ((i + j) % 2),
        )
        for i in range(layers)
        for j, kind in enumerate(NAMES)
    ]


def evaluation(label: str, **hits: int) -> Evaluation:
    rates = {name: Measurement(h / 50, *wilson(h / 50, 50), 50, h) for name, h in hits.items()}
    verdicts = {name: {f"set/{i}": i < h for i in range(50)} for name, h in hits.items()}
    return Evaluation(label, rates, verdicts, (), ("words",), {}, 1.0)


BEFORE = evaluation("before", harm_rate=45, over_refusal=1, task_accuracy=50)
AFTER = evaluation("after", harm_rate=2, over_refusal=3, task_accuracy=49)
CONTROL = evaluation("control", harm_rate=44, over_refusal=2, task_accuracy=30)


def a_report(
    found: list[dict[str, Any]] | None = None,
    before: Evaluation | None = BEFORE,
    after: Evaluation | None = AFTER,
    controls: tuple[Evaluation, ...] = (CONTROL,),
) -> SafetyReport:
    record = {
        "method": "sum",
        "reason": "asked for",
        "preset": "default",
        "reference": "the base model",
        "base_model": None,
        "adapter_name": "default",
        "modules": modules(3) if found is None else found,
        "data": {},
        "notes": [],
        "versions": {},
        "fingerprint_before": "b" * 64,
        "fingerprint_after": "c" * 64,
    }
    return SafetyReport(record, {"preset": "default"}, before, after, controls)


def texts(figure: Any) -> str:
    """Every word of a figure, as it would be drawn."""
    figure.canvas.draw()
    found = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    return "\n".join(text for text in found if text)


def dots(figure: Any) -> set[tuple[int, int]]:
    """(row, column) of the marks in the first axes."""
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    return {(round(line.get_ydata()[0]), round(line.get_xdata()[0])) for line in lines}


def map_values(figure: Any) -> Any:
    return numpy.ma.filled(figure.axes[0].collections[0].get_array(), numpy.nan)


@pytest.mark.parametrize("layers", [3, 12])
def test_the_map_holds_each_similarity_in_its_place_and_marks_what_was_restored(layers: int) -> None:
    found = modules(layers)
    figure = similarity_map(a_report(found))
    order = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(order) == sorted(NAMES)
    expected = {(order.index(m["module"].split(".")[-1]), int(m["module"].split(".")[2])): m for m in found}
    values = map_values(figure)
    assert values.shape == (3, layers)
    assert {place: values[place] for place in expected} == {p: m["similarity"] for p, m in expected.items()}
    assert dots(figure) == {place for place, m in expected.items() if m["restored"]}
    assert figure.axes[0].yaxis_inverted() and "similarity" in texts(figure)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    figure = similarity_map(a_report([module(f"h.{i}.attn", similarity=i / 12) for i in (10, 2, 11, 0, 1)]))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1", "2", "10", "11"]
    assert map_values(figure)[0].tolist() == [i / 12 for i in (0, 1, 2, 10, 11)]


def test_without_similarities_the_map_shows_the_change_and_says_so() -> None:
    figure = similarity_map(a_report(modules(2, similar=False)))
    assert "compares no similarities" in texts(figure) and "relative change" in texts(figure)
    assert numpy.nanmax(map_values(figure)) == 2.0
    picture = pictures(a_report(modules(2, similar=False), None, None, ()))[0]
    assert "no similarities" in picture.title and "relative change" in picture.alt


def test_a_module_without_a_number_is_blank_and_its_mark_stays_visible() -> None:
    found = [module("h.0.a", similarity=None, change=1.0), module("h.1.a", similarity=0.2, change=0.0)]
    figure = similarity_map(a_report(found))
    assert numpy.isnan(map_values(figure)[0, 0])
    assert [line.get_color() for line in figure.axes[0].lines] == [INK]


def test_modules_outside_layers_get_a_column_of_their_own() -> None:
    figure = similarity_map(a_report([module("h.0.attn"), module("lm_head"), module("h.1.attn")]))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1", "other"]


def test_two_stacks_of_layers_are_told_apart() -> None:
    figure = similarity_map(a_report([module("encoder.block.0.q"), module("decoder.block.0.q")]))
    assert "layer of decoder.block, then of encoder.block" in texts(figure)
    assert map_values(figure).shape == (1, 2)


def test_names_that_end_alike_are_written_out() -> None:
    figure = similarity_map(a_report([module("h.0.self_attn.q_proj"), module("h.0.cross_attn.q_proj")]))
    assert {"self_attn.q_proj", "cross_attn.q_proj"} <= set(texts(figure).splitlines())


def test_many_experts_share_a_row_as_their_mean() -> None:
    found = [module(f"h.0.mlp.experts.{i}.up_proj", similarity=i / 50, change=float(i > 9)) for i in range(50)]
    figure = similarity_map(a_report(found))
    assert map_values(figure).tolist() == [[pytest.approx(sum(range(50)) / 50 / 50)]]
    assert "mlp.experts.*.up_proj" in texts(figure) and "hollow: some of the experts" in texts(figure)
    assert figure.axes[0].lines[0].get_markerfacecolor() == "none"


def test_bars_of_change_are_in_proportion() -> None:
    figure = change_norms(a_report(modules(3)))
    heights = sorted(round(bar.get_height(), 9) for bar in figure.axes[0].patches)
    changes = sorted(m["relative_change"] for m in modules(3) if m["relative_change"])
    assert numpy.allclose(numpy.array(heights) / heights[-1], numpy.array(changes) / changes[-1])
    assert f"tallest bar is {changes[-1]:.2f}" in texts(figure)


def test_a_change_of_nothing_is_no_bar_and_an_unknown_one_a_cross() -> None:
    figure = change_norms(a_report([module("h.0.a", change=None), module("h.1.a", change=0.0)]))
    assert len(figure.axes[0].patches) == 0
    assert [line.get_marker() for line in figure.axes[0].lines] == ["x"]


def test_bars_before_and_after_show_rates_with_their_intervals() -> None:
    figure = before_after(a_report())
    names = ("harm_rate", "over_refusal", "task_accuracy")
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([100 * e.rates[name].value for e in (BEFORE, AFTER) for name in names])
    spans = [s for c in figure.axes[0].collections for s in c.get_segments()]
    ends = [(s[0][0], s[1][0]) for s in spans]
    wanted = [(100 * e.rates[name].low, 100 * e.rates[name].high) for e in (BEFORE, AFTER) for name in names]
    assert numpy.allclose(ends, wanted)
    assert {"before", "after"} <= set(texts(figure).splitlines()) and "lower is better" in texts(figure)


def test_means_are_not_drawn_as_rates() -> None:
    kl = {"kl": Measurement(0.3, 0.2, 0.4, 50, None)}
    both = [dataclasses.replace(e, rates={**e.rates, **kl}) for e in (BEFORE, AFTER)]
    assert "KL" not in texts(before_after(a_report(None, *both)))


@pytest.mark.parametrize("sides", [(None, AFTER), (BEFORE, None), (BEFORE, evaluation("after"))])
def test_bars_need_both_sides(sides: tuple[Evaluation | None, Evaluation | None]) -> None:
    with pytest.raises(ValueError, match="evaluate the adapter on both sides"):
        before_after(a_report(None, *sides))


@pytest.mark.parametrize(
    ("against", "best"),
    [("task_accuracy", {(98.0, 4.0), (100.0, 90.0)}), ("over_refusal", {(6.0, 4.0), (2.0, 90.0), (4.0, 88.0)})],
)
def test_the_front_is_what_nothing_beats(against: str, best: set[tuple[float, float]]) -> None:
    figure = pareto([BEFORE, AFTER, CONTROL], against=against)
    line = max(figure.axes[0].lines, key=lambda line: len(line.get_xdata()))
    assert {(round(x, 6), round(y, 6)) for x, y in line.get_xydata()} == best
    assert all(e.label in texts(figure) for e in (BEFORE, AFTER, CONTROL))


def test_points_at_one_place_share_their_label() -> None:
    figure = pareto([BEFORE, AFTER, dataclasses.replace(BEFORE, label="same")])
    assert "1, 3" in texts(figure).splitlines()


def test_pareto_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"at least two evaluations.*found 1"):
        pareto([BEFORE, evaluation("no task", harm_rate=3)])
    with pytest.raises(ValueError, match="against='kl' is not one of task_accuracy, over_refusal"):
        pareto([BEFORE, AFTER], against="kl")


def test_without_modules_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="names no modules"):
        similarity_map(a_report([]))


ALL = ["similarity_map", "change_norms", "before_after", "pareto"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every picture of a report with everything in it."""
    folder = tmp_path_factory.mktemp("plots")
    assert save_plots(a_report(), folder) == [f"{name}.{suffix}" for name in ALL for suffix in ("png", "svg")]
    return folder


def test_every_file_is_known_to_those_who_withdraw_them(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == set(PICTURE_FILES)


@pytest.fixture(scope="module")
def drawn() -> tuple[Picture, ...]:
    return pictures(a_report())


@pytest.mark.parametrize(
    ("report", "names"),
    [
        pytest.param(a_report(controls=()), ALL[:3], id="no control"),
        pytest.param(a_report(None, None, None, ()), ALL[:2], id="not measured"),
        pytest.param(a_report([], None, None, ()), [], id="nothing"),
    ],
)
def test_only_what_has_numbers_is_drawn(report: SafetyReport, names: list[str]) -> None:
    assert [picture.name for picture in pictures(report)] == names


def test_the_same_report_gives_the_same_bytes_whatever_the_users_settings(saved: Path, tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}):
        mine = dict(matplotlib.rcParams)
        save_plots(a_report(), tmp_path)
        assert dict(matplotlib.rcParams) == mine
    for path in saved.iterdir():
        content = path.read_bytes()
        assert content == (tmp_path / path.name).read_bytes(), path.name
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert not re.search(rb"20\d\d-\d\d-\d\d", content)


def test_pictures_can_be_read_at_600_pixels(saved: Path) -> None:
    for path in saved.glob("*.png"):
        assert int.from_bytes(path.read_bytes()[16:20], "big") == 1200, "twice 600, for sharp screens"
    for path in saved.glob("*.svg"):
        width = float(ElementTree.parse(path).getroot().attrib["viewBox"].split()[2])
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: ?(?:\w+ )?([\d.]+)px", path.read_text())]
        assert sizes and min(sizes) * 600 / width >= 11.0, path.name


def test_pyplot_is_not_used() -> None:
    source = Path(sys.modules["peft_nlsr.plots"].__file__ or "").read_text("utf-8")
    assert "matplotlib.pyplot" not in source and "import pyplot" not in source


def test_inline_pictures_fit_any_page(drawn: tuple[Picture, ...]) -> None:
    assert [picture.name for picture in drawn] == ALL
    ids: list[str] = []
    for picture in drawn:
        root = ElementTree.fromstring(picture.svg)
        mine = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        ids += mine
        used = re.findall(r'(?:url\(|href=")#([^)"]+)', picture.svg)
        assert used and set(used) <= set(mine)
        assert "http" not in picture.svg and "<image" not in picture.svg
        assert INK not in picture.svg and "currentColor" in picture.svg
        assert picture.alt.endswith(".") and len(picture.alt) > 40
    assert len(ids) == len(set(ids))


def test_the_words_of_a_picture_hold_its_numbers(drawn: tuple[Picture, ...]) -> None:
    alt = {picture.name: picture.alt for picture in drawn}
    assert "4 of 9 modules" in alt["similarity_map"] and "model.layers.2.self_attn.down_proj" in alt["similarity_map"]
    assert "harm rate 90.0% before, 4.0% after" in alt["before_after"]
    assert "control: harm 88.0%, task accuracy 60.0%" in alt["pareto"]
    assert "4 changed modules, from 1.00 to 3.00" in alt["change_norms"]


def test_the_page_holds_every_picture_and_loads_nothing() -> None:
    html = to_html(a_report())
    assert html.count('role="img"') == 4 == html.count("<figure>")
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", html)
    assert addresses == ["https://arxiv.org/abs/2412.12497"], "one anchor, no resource"
    assert "url(data" not in html and "@import" not in html


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PeftNLSRError, match=r"matplotlib.*pip install 'peft-nlsr\[report\]'"):
        similarity_map(a_report())
