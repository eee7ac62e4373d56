"""Draws charts as SVG and encodes images as PNG, for use inside the page; the same numbers give the same bytes."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np
from markupsafe import Markup

from pipeline.data.arrays import Images
from pipeline.data.seeding import level_name
from pipeline.perturbations import PERTURBATIONS
from pipeline.recipes.plan import CLEAN

# Size of a chart, and of its margins, in units of about a pixel; the page scales charts to the available width.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 250, 38, 10, 12, 44
# Labels of the x axis that are closer to each other than this would overlap.
_LABEL_WIDTH = 34
# Longer side of a picture, in pixels: twice its size on the page, for high-resolution screens.
_PICTURE = 104
# Colours of the page's style sheet: s0 to s11.
N_COLORS = 12


@dataclass(frozen=True)
class Point:
    """A mean and its spread; accuracies in [0, 1]."""

    x: float
    mean: float
    std: float = 0.0


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: For the legend.
        points: From left to right.
        color: Number of its colour.
        is_dashed: Whether the line is dashed, as the authors' values are.
    """

    name: str
    points: Sequence[Point]
    color: int
    is_dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with its title and legend.

    Attributes:
        title: What it shows.
        svg: The chart.
        legend: (name, colour, dashed) of every line or kind of bar.
    """

    title: str
    svg: Markup
    legend: Sequence[tuple[str, int, bool]]


def name_level(perturbation: str, level: float) -> str:
    """A level in words: `noise 0.05`, `hot 2`, `clean`."""
    return CLEAN if perturbation == CLEAN else f"{perturbation} {level_name(level)}"


def explain_level(perturbation: str, level: float) -> str:
    """As `name_level`, with the unit: `noise σ = 0.05`, `hot 2 pixels`."""
    if perturbation == CLEAN:
        return CLEAN
    name, unit = level_name(level), PERTURBATIONS[perturbation].unit
    if unit == "n_pixels":
        return f"{perturbation} {name} pixel{'' if name == '1' else 's'}"
    return f"{perturbation} {'σ' if unit == 'sigma' else unit} = {name}"


def draw_lines(title: str, x_label: str, series: Sequence[Series], reference: float | None = None) -> Chart:
    """Draw accuracy, from 0 to 100 %, against a number, with error bars of one standard deviation.

    Args:
        title: What the chart shows.
        x_label: What the number is.
        series: The lines; all points together have at least one x.
        reference: Accuracy on clean images, in [0, 1], to draw as a dotted line.
    """
    xs = sorted({point.x for one in series for point in one.points})
    low, high = (xs[0], xs[-1]) if len(xs) > 1 else (xs[0] - 1, xs[0] + 1)

    def place(x: float) -> float:
        return _LEFT + 12 + (x - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT - 24)

    marks = [_frame(x_label)]
    last = -np.inf
    for x in xs:
        if place(x) - last >= _LABEL_WIDTH:
            last = place(x)
            marks.append(_text(last, _HEIGHT - _BOTTOM + 16, level_name(x), "middle"))
            marks.append(f'<path class="grid" d="M{last:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
    if reference is not None:
        marks.append(f'<path class="reference" d="M{_LEFT} {_height(reference):.1f}H{_WIDTH - _RIGHT}"/>')
    for one in series:
        where = [(place(point.x), _height(point.mean)) for point in one.points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in where)
        marks.append(f'<g class="s{one.color}{" dashed" if one.is_dashed else ""}"><path class="line" d="M{line}"/>')
        for point, (x, y) in zip(one.points, where, strict=True):
            if point.std > 0:
                top, bottom = _height(min(1, point.mean + point.std)), _height(max(0, point.mean - point.std))
                marks.append(f'<path class="spread" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
            said = f"{one.name}, {level_name(point.x)}: {100 * point.mean:.1f} %"
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(said)}</title></circle>')
        marks.append("</g>")
    said = "; ".join(
        f"{one.name}: " + ", ".join(f"{level_name(point.x)} {100 * point.mean:.0f} %" for point in one.points)
        for one in series
    )
    return Chart(title, _svg(f"{title}. {said}.", marks), [(one.name, one.color, one.is_dashed) for one in series])


def assign_colors(names: Sequence[str]) -> dict[str, int]:
    """Assign every name the number of a colour; only the first is grey."""
    return {name: 1 + (number - 1) % (N_COLORS - 1) if number else 0 for number, name in enumerate(names)}


def draw_bars(title: str, groups: Mapping[str, Sequence[float | None]], colors: Mapping[str, int]) -> Chart:
    """Draw accuracies as groups of bars, from 0 to 100 %.

    Args:
        title: What the chart shows.
        groups: Name of a group → accuracies in [0, 1], one for each bar; None where there is none.
        colors: Names of the bars of every group, from left to right → the number of their colour.
    """
    names = list(colors)
    marks = [_frame("")]
    width = (_WIDTH - _LEFT - _RIGHT) / len(groups)
    bar = 0.84 * width / len(names)
    for number, (group, values) in enumerate(groups.items()):
        left = _LEFT + (number + 0.08) * width
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            if value is None:
                continue
            x, y = left + place * bar, _height(value)
            marks.append(
                f'<g class="s{colors[name]}"><rect x="{x:.1f}" y="{y:.1f}" width="{max(bar - 1, 1):.1f}" '
                f'height="{_HEIGHT - _BOTTOM - y:.1f}"><title>{escape(f"{name}, {group}: {100 * value:.1f} %")}'
                "</title></rect></g>"
            )
            if bar >= 15:
                marks.append(_text(x + bar / 2 - 0.5, y - 3, f"{100 * value:.0f}", "middle", "small"))
        words = group.split()
        for line, text in enumerate(words if len(words) <= 2 else [words[0], " ".join(words[1:])]):
            marks.append(_text(left + 0.42 * width, _HEIGHT - _BOTTOM + 15 + 13 * line, text, "middle", "small"))
    said = "; ".join(
        f"{group}: " + ", ".join(f"{n} {100 * v:.0f} %" for n, v in zip(names, values, strict=True) if v is not None)
        for group, values in groups.items()
    )
    legend = [(name, color, False) for name, color in colors.items()]
    return Chart(title, _svg(f"{title}. {said}.", marks), legend)


def encode_image(image: Images) -> str:
    """Encode an image as the data URL of a PNG, made smaller if it has more pixels than are shown.

    Args:
        image: uint8 (H, W, C), grey or RGB.
    """
    scale = _PICTURE / max(image.shape[:2])
    if scale < 1:
        height, width = (max(1, round(scale * side)) for side in image.shape[:2])
        smaller = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        image = np.asarray(smaller, np.uint8).reshape(*smaller.shape[:2], image.shape[2])
    _, content = cv2.imencode(".png", image[..., ::-1] if image.shape[2] == 3 else image)
    return f"data:image/png;base64,{base64.b64encode(content.tobytes()).decode()}"


def _height(share: float) -> float:
    return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)


def _frame(x_label: str) -> str:
    lines = [
        f'<path class="{"axis" if share == 0 else "grid"}" d="M{_LEFT} {_height(share):.1f}H{_WIDTH - _RIGHT}"/>'
        + _text(_LEFT - 5, _height(share) + 4, f"{100 * share:.0f}", "end")
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    return "".join(lines) + (_text((_LEFT + _WIDTH) / 2, _HEIGHT - 8, x_label, "middle") if x_label else "")


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(said: str, marks: Sequence[str]) -> Markup:
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(said, quote=True)}">'
    return Markup(f"{head}{''.join(marks)}</svg>")
