"""The report's figures: arrays in, PNG bytes out. Same arrays, same bytes.

Each figure is drawn for a light and a dark page, at the width of a phone, so that its text is read at the size of the
page's own. matplotlib is loaded by the first figure, not by importing this file.
"""

import io
import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN, HEIGHT_IN, ROW_IN = 4.2, 2.9, 0.2
PANEL_WIDTH_IN = 1.4 * WIDTH_IN  # of a picture of its own, on a screen's width
DPI = 190  # 798 pixels: sharp at 400 CSS pixels on a screen of two pixels each
MOST_BARS = 40  # classes that are drawn by name; more are drawn as sorted curves
MOST_LETTERS = 16
ROW_LETTERS, LINES_A_ROW = 24, 3  # of the rows of a study: a line's letters, lines
LEGEND_COLUMNS = 3
SMOOTHED_RECORDS = 7  # single batches jump so much that the curves of several models cannot be told apart
WIDE_RANGE = 100  # counts that differ by more are drawn on a logarithmic scale
FONT_POINTS = 9.5
FONT = "DejaVu Sans"  # comes with matplotlib, so that every machine draws the same letters

_SETTINGS = threading.Lock()  # matplotlib's settings belong to the process; two reports may be drawn at once

History = dict[str, np.ndarray]  # the columns of a training's history, NaN where nothing was measured


@dataclass(frozen=True)
class Theme:
    """The colors of a page. `series` tells models apart (Okabe and Ito's palette: also without red or green)."""

    surface: str
    text: str
    muted: str
    pale: str
    accent: str
    warm: str
    series: tuple[str, ...]


LIGHT = Theme(
    surface="#ffffff",
    text="#1f2937",
    muted="#9aa3af",
    pale="#dde2e8",
    accent="#0072b2",
    warm="#c2410c",
    series=("#374151", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)
DARK = Theme(
    surface="#171c24",
    text="#e5e7eb",
    muted="#768293",
    pale="#39424f",
    accent="#56b4e9",
    warm="#fb923c",
    series=("#d1d5db", "#56b4e9", "#ff8a3d", "#2cc795", "#e59ac4", "#f3c04b", "#9fd6f7"),
)


def loss_curves(theme: Theme, histories: dict[str, History]) -> bytes:
    """Training losses by epoch, one color a model: labeled solid, unlabeled dashed; means of `SMOOTHED_RECORDS`."""

    def paint(axes: "Axes") -> None:
        for color, (name, history) in zip(_colors(theme, histories), histories.items(), strict=True):
            axes.plot(history["epoch"], _running_mean(history["loss_labeled"]), color=color, label=name)
            if not np.isnan(history["loss_unlabeled"]).all():
                unlabeled = _running_mean(history["loss_unlabeled"])
                axes.plot(history["epoch"], unlabeled, color=color, linestyle=(0, (3, 1.5)))
        if any(not np.isnan(history["loss_unlabeled"]).all() for history in histories.values()):
            axes.plot([], [], color=theme.muted, linestyle=(0, (3, 1.5)), label="on unlabeled")
        axes.set(xlabel="epoch (of the labeled images)", ylabel="loss")
        axes.set_ylim(bottom=0)
        _legend(axes)

    return _draw(theme, paint)


def history_curves(
    theme: Theme, histories: dict[str, History], column: str, label: str, percent: bool = False
) -> bytes:
    """One column of the histories by epoch, one color a model; dots where it was measured now and then only."""

    def paint(axes: "Axes") -> None:
        for color, (name, history) in zip(_colors(theme, histories), histories.items(), strict=True):
            there = ~np.isnan(history[column])
            values = history[column][there] * (100 if percent else 1)
            marker = "" if there.all() else "o"
            axes.plot(history["epoch"][there], values, color=color, marker=marker, markersize=3, label=name)
        axes.set(xlabel="epoch (of the labeled images)", ylabel=label)
        _legend(axes)

    return _draw(theme, paint)


def confidence_histogram(theme: Theme, counts: Sequence[int], threshold: float | None) -> bytes:
    """Pseudo-labels by confidence, in equal bins of [0, 1]; bins below the threshold are gray."""

    def paint(axes: "Axes") -> None:
        left = np.arange(len(counts)) / len(counts)
        below = left + 1e-9 < (threshold or 0.0)
        colors = np.where(below, theme.muted, theme.accent)
        axes.bar(left, counts, width=1 / len(counts), align="edge", color=list(colors), edgecolor=theme.surface)
        if threshold:  # at 0 every image passes, and its words would lie upon the bars
            axes.axvline(threshold, color=theme.warm)
            side, shift = ("left", 4) if threshold < 0.6 else ("right", -4)
            axes.annotate(
                f"threshold {threshold:g}", (threshold, 0.97), (shift, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", color=theme.warm, ha=side, va="top",
            )  # fmt: skip
        axes.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
        _count_axis(axes.yaxis)

    return _draw(theme, paint)


def class_counts(theme: Theme, names: Sequence[str], per_class: dict[str, Sequence[int]]) -> bytes:
    """Images a class before and after balancing; sorted curves for many classes.

    per_class: counts in the order of the classes, `available` (predicted as the class), `kept` and `copies`.
    """
    available, kept, copies = (np.asarray(per_class[name]) for name in ("available", "kept", "copies"))

    def bars(axes: "Axes") -> None:
        places = np.arange(len(names))
        axes.barh(places, available, height=0.8, color=theme.pale, label="predicted")
        axes.barh(places, kept, height=0.45, color=theme.accent, label="kept")
        axes.plot(copies, places, "|", color=theme.warm, markersize=10, markeredgewidth=2, label="after balancing")
        _class_axis(axes, names)
        axes.set(xlabel="images", xlim=(0, None))
        _count_axis(axes.xaxis)
        _legend(axes, first=("predicted", "kept"))

    def curves(axes: "Axes") -> None:
        for values, color, label in (
            (available, theme.muted, "predicted"),
            (kept, theme.accent, "kept"),
            (copies, theme.warm, "after balancing"),
        ):
            axes.plot(np.sort(values)[::-1], color=color, label=label)
        axes.set(xlabel="classes, each curve sorted by itself", ylabel="images")
        least = min(available[available > 0].min(initial=1), kept[kept > 0].min(initial=1))
        if max(available.max(), copies.max()) > WIDE_RANGE * least:
            axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        _count_axis(axes.yaxis)
        _legend(axes)

    if len(names) > MOST_BARS:
        return _draw(theme, curves)
    return _draw(theme, bars, len(names))


def class_accuracy(theme: Theme, names: Sequence[str], before: np.ndarray, after: np.ndarray, label: str) -> bytes:
    """Accuracy a class of the teacher and of the student named `label`, in percent; sorted gains for many classes.

    before, after: float [classes] in [0, 1]; NaN for a class without test images.
    """

    def dumbbells(axes: "Axes") -> None:
        places = np.arange(len(names))
        axes.hlines(places, before * 100, after * 100, color=theme.muted, linewidth=2)
        axes.plot(
            before * 100, places, "o", color=theme.muted, markerfacecolor=theme.surface, markersize=6, label="0/teacher"
        )
        axes.plot(after * 100, places, "o", color=theme.accent, markersize=5, label=label)
        _class_axis(axes, names)
        axes.set(xlabel="accuracy on the test images, %")
        _legend(axes)

    def gains(axes: "Axes") -> None:
        points = np.sort((after - before)[~np.isnan(after - before)])[::-1] * 100
        colors = np.where(points < 0, theme.warm, theme.accent)
        axes.bar(np.arange(len(points)), points, width=1.0, color=list(colors))
        axes.axhline(0, color=theme.text, linewidth=0.8)
        axes.set(xlabel="classes, sorted by gain", ylabel="gain over the teacher, points")

    if len(names) > MOST_BARS:
        return _draw(theme, gains)
    return _draw(theme, dumbbells, len(names))


def study_differences(
    theme: Theme, names: Sequence[str], paper: np.ndarray, ours: np.ndarray, errors: np.ndarray, label: str
) -> bytes:
    """How far each row of a study lies from the row it is compared with: the paper's differences and ours.

    paper, ours, errors (one standard error of ours): float [rows], NaN where there is none. `label`: of the axis.
    """
    wrapped = ["\n".join(textwrap.wrap(name, ROW_LETTERS, max_lines=LINES_A_ROW, placeholder=" …")) for name in names]

    def paint(axes: "Axes") -> None:
        places = np.arange(len(names))
        axes.axvline(0, color=theme.text, linewidth=0.8)
        axes.errorbar(ours, places + 0.12, xerr=errors, fmt="o", color=theme.accent, markersize=5, label="here")
        axes.plot(
            paper, places - 0.12, "o", color=theme.muted, markerfacecolor=theme.surface, markersize=6, label="paper"
        )
        _row_axis(axes, wrapped)
        axes.set(xlabel=label)
        axes.margins(x=0.08)
        _legend(axes)

    return _draw(theme, paint, LINES_A_ROW * len(names))


def reliability_diagram(theme: Theme, rows: Sequence[dict[str, Any]]) -> bytes:
    """Accuracy by confidence; rows: low, high (of a bin), images, accuracy in [0, 1] (None in empty bins)."""

    def paint(axes: "Axes") -> None:
        there = [row for row in rows if row["images"]]
        most = max((row["images"] for row in there), default=1)
        for row in there:
            strength = 0.25 + 0.75 * (row["images"] / most) ** 0.5
            width = row["high"] - row["low"]
            axes.bar(row["low"], row["accuracy"] * 100, width, align="edge", color=theme.accent, alpha=strength)
        axes.plot([0, 1], [0, 100], color=theme.warm, linestyle=(0, (3, 1.5)))
        axes.set(xlabel="confidence", ylabel="accuracy, %", xlim=(0, 1), ylim=(0, 100))

    return _draw(theme, paint)


def confusion_matrix(theme: Theme, names: Sequence[str], counts: np.ndarray) -> bytes:
    """Which classes are taken for which: of the images of each class (a row) the share that is predicted as each class.

    counts: int [classes, classes], labels by predictions. Colors go by the root of the share, so that few mistakes show.
    """

    def paint(axes: "Axes") -> None:
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        colors = LinearSegmentedColormap.from_list("share", [theme.surface, theme.accent])
        axes.imshow(shares, cmap=colors, norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest", aspect="auto")
        _class_axis(axes, names)
        size = min(FONT_POINTS, 230 / len(names))  # the axes are about 230 points wide
        axes.set_xticks(np.arange(len(names)), labels=_drawable(names), rotation=90, fontsize=size)
        axes.grid(visible=False)
        axes.set(xlabel="predicted", ylabel="label", ylim=(len(names) - 0.5, -0.5))

    return _draw(theme, paint, len(names))


def _draw(theme: Theme, paint: Callable[["Axes"], None], num_rows: int = 0) -> bytes:
    """PNG bytes of one pair of axes; tall enough for `num_rows` class names."""
    import matplotlib
    from matplotlib.figure import Figure

    stream = io.BytesIO()
    with _SETTINGS, matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the settings of whoever runs this
        matplotlib.rcParams.update(_settings(theme))
        figure = Figure(figsize=(WIDTH_IN, max(HEIGHT_IN, 1.0 + ROW_IN * num_rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        paint(axes)
        figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def draw_panels(
    theme: Theme, panels: Sequence[tuple[Callable[["Axes"], None], int]], colors: dict[str, str], width_in: float
) -> bytes:
    """PNG bytes of several axes below each other, each as tall as its rows need; one legend of names and colors for all."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    heights = [max(HEIGHT_IN * 0.6, 1.0 + ROW_IN * rows) if rows else HEIGHT_IN for _, rows in panels]
    stream = io.BytesIO()
    with _SETTINGS, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_settings(theme))
        figure = Figure(figsize=(width_in, sum(heights) + 0.4), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for (paint, _), own in zip(panels, axes, strict=True):
            own.set_axisbelow(True)
            paint(own)
        handles = [Line2D([], [], color=color, marker="o", linestyle="") for color in colors.values()]
        figure.legend(handles, list(colors), loc="outside upper center", ncols=min(len(colors), LEGEND_COLUMNS))
        figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def _settings(theme: Theme) -> dict[Any, Any]:
    return {
        "font.family": FONT,
        "font.size": FONT_POINTS,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": theme.surface,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.xmargin": 0.02,
        "grid.color": theme.pale,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.4,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "figure.facecolor": theme.surface,
        "legend.frameon": False,
        "text.parse_math": False,  # a class may be called `$5`
    }


def _colors(theme: Theme, items: Sequence[str] | dict[str, Any]) -> list[str]:
    return [theme.series[number % len(theme.series)] for number in range(len(items))]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbors; of fewer at the ends."""
    window = np.ones(min(SMOOTHED_RECORDS, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _legend(axes: "Axes", first: Sequence[str] = ()) -> None:
    """Above the axes, so that it covers no data; read row by row, while matplotlib fills it column by column."""
    handles, names = axes.get_legend_handles_labels()
    by_name = dict(zip(names, handles, strict=True))
    names = [*first, *(name for name in names if name not in first)]
    by_column = [name for column in range(LEGEND_COLUMNS) for name in names[column::LEGEND_COLUMNS]]
    axes.legend(
        [by_name[name] for name in by_column], by_column, ncols=LEGEND_COLUMNS, loc="lower left",
        bbox_to_anchor=(0, 1.0), borderaxespad=0.2, handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip


def _count_axis(axis: Any) -> None:
    """Whole numbers, as 250, 10k, 1.3M."""
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))


def _class_axis(axes: "Axes", names: Sequence[str]) -> None:
    """One row a class, the first on top."""
    _row_axis(axes, _drawable(names))


def _row_axis(axes: "Axes", names: Sequence[str]) -> None:
    """One row a name, the first on top."""
    axes.set_yticks(np.arange(len(names)), labels=names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _drawable(names: Sequence[str]) -> list[str]:
    """The class names cut to length; the class's number where the font lacks a letter of its name."""
    from matplotlib.font_manager import findfont, get_font

    letters = get_font(findfont(FONT)).get_charmap()
    short = [name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…" for name in names]
    return [text if all(ord(c) in letters for c in text) else f"class {n}" for n, text in enumerate(short)]
