"""Draws the README's picture from the lab report that its table comes from.

Run: ``python -m benchmarks.lab_picture``. The same report gives the same bytes; every number is also in the table.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from .lab_table import REPORT, ROOT

PICTURE = ROOT / "docs" / "images" / "lab.svg"
CELL = ("hard", "shared")
METHODS = {
    "fine-tuned": "fine-tuned, 5% poison",
    "random mask": "random mask (control)",
    "paper, Wanda": "NLSR (paper), Wanda",
    "sum, Wanda": "NLSR (sum), Wanda",
    "two-teacher": "two-teacher (default)",
}
RATES = {
    "harm": ("harm rate: less is better", "#d55e00"),
    "benign_answered": ("benign answered: more is better", "#1f83c4"),
    "task": ("task score: more is better", "#1f83c4"),
}
_LABELS, _PANEL, _BAR, _ROW, _TOP = 190, 196, 140, 30, 62  # pixels


def picture(report: dict[str, Any]) -> str:
    """An SVG with one row per method and one panel per rate; bars are means over seeds, lines 95 % intervals."""
    found = {row["method"]: row["rates"] for row in report["summary"] if (row["task"], row["lineage"]) == CELL}
    width, height = _LABELS + _PANEL * len(RATES), _TOP + _ROW * len(METHODS) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#1b1f24">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(12, 24, "The hard task: benign requests, of the same form as the attack", weight=600),
        *(_text(_x(i), _TOP - 12, title, size=11) for i, (title, _) in enumerate(RATES.values())),
    ]
    for number, (method, label) in enumerate(METHODS.items()):
        y = _TOP + _ROW * number
        parts.append(_text(12, y + 14, label, weight=600 if method == "two-teacher" else 400))
        for i, (rate, (_, colour)) in enumerate(RATES.items()):
            parts += _bar(_x(i), y, colour, found[method][rate])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(panel: int) -> int:
    return _LABELS + _PANEL * panel


def _text(x: float, y: float, text: str, *, size: int = 13, weight: int = 400) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}">{escape(text)}</text>'


def _bar(x: int, y: int, colour: str, rate: dict[str, float]) -> list[str]:
    low, high = (x + _BAR * max(0.0, min(1.0, rate[end])) for end in ("low", "high"))
    return [
        f'<rect x="{x}" y="{y}" width="{_BAR}" height="18" fill="#eaeef2"/>',
        f'<rect x="{x}" y="{y}" width="{_BAR * rate["mean"]:.1f}" height="18" fill="{colour}"/>',
        f'<path d="M{low:.1f} {y + 9}H{high:.1f}" stroke="#1b1f24" stroke-width="1.5"/>',
        _text(x + _BAR + 8, y + 14, f"{100 * rate['mean']:.0f}%"),
    ]


def main() -> None:
    """Write the picture."""
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture(json.loads(REPORT.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
