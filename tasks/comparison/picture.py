"""One picture of a comparison: clean top-1, corruptions, attacks and flips of all models. Arrays in, PNG bytes out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from storage.artifacts import Manifest
from storage.objects import Store
from tasks.comparison.compare import Group, Measure
from tasks.comparison.images import SPLIT
from tasks.inspection.images import contact_sheet, read_images
from tasks.report_figures import LIGHT, PANEL_WIDTH_IN, Theme, draw_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

TITLES = {
    "clean": "clean images",
    "corrupted": "made corruptions",
    "imagenet_c": "ImageNet-C",
    "imagenet_p": "ImageNet-P",
    "perturbed": "made sequences",
    "subset": "some classes (ImageNet-A)",
    "fgsm": "FGSM",
    "pgd": "PGD",
}


def comparison_picture(
    groups: Sequence[Group], models: Sequence[str], theme: Theme = LIGHT, width_in: float = PANEL_WIDTH_IN
) -> bytes:
    """A panel a kind of evaluation, a color a model; clean top-1 with its 95 % interval."""
    colors = {name: theme.series[number % len(theme.series)] for number, name in enumerate(models)}
    panels: list[tuple[Callable[[Axes], None], int]] = []
    for group in groups:
        if group.evaluator in ("fgsm", "pgd"):
            panels.append((partial(_curve, group=group, colors=colors), 0))
        elif group.evaluator in ("clean", "subset"):
            panels.append((partial(_intervals, group=group, colors=colors), len(colors)))
        else:
            rows = [measure for measure in group.measures if measure.unit == "share"]
            panels.append((partial(_dots, group=group, rows=rows, colors=colors), len(rows)))
    return draw_panels(theme, panels, colors, width_in)


def changed_sheet(
    store: Store, data: Manifest, changed: dict[str, list[dict[str, str]]], a: str, b: str
) -> "Image.Image":
    """The images on which two models differ, as one picture: what was predicted, and what it is."""
    titles = {"won": f"wrong by {a}, right by {b}", "lost": f"right by {a}, wrong by {b}"}
    groups = {}
    for fate, rows in changed.items():
        images = read_images(store, data, SPLIT, [row["key"] for row in rows])
        wrong = "a" if fate == "won" else "b"
        groups[titles[fate]] = [
            (image, f"{row[wrong]} (is {row['label']})") for image, row in zip(images, rows, strict=True)
        ]
    return contact_sheet(groups)


def _intervals(axes: "Axes", group: Group, colors: dict[str, str]) -> None:
    measure = group.measures[0]
    for place, (name, value) in enumerate(measure.values.items()):
        low, high = value.low or 0.0, 1.0 if value.high is None else value.high
        spread = [[100 * (value.value - low)], [100 * (high - value.value)]]
        axes.errorbar(100 * value.value, place, xerr=spread, fmt="o", color=colors[name], capsize=4, markersize=6)
    axes.set_yticks(range(len(measure.values)), list(measure.values))
    axes.set_ylim(len(measure.values) - 0.5, -0.5)
    axes.set(title=TITLES[group.evaluator], xlabel="top-1, %")


def _dots(axes: "Axes", group: Group, rows: Sequence[Measure], colors: dict[str, str]) -> None:
    for name in group.manifests:
        axes.plot(
            [100 * row.values[name].value for row in rows], range(len(rows)), "o", color=colors[name], markersize=5
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    what = "flips, %" if group.evaluator in ("imagenet_p", "perturbed") else "error, %"
    axes.set(title=TITLES[group.evaluator], xlabel=what)


def _curve(axes: "Axes", group: Group, colors: dict[str, str]) -> None:
    for name, manifest in group.manifests.items():
        values = manifest.metrics["accuracy"]
        axes.plot(
            [float(e) for e in values], [100 * v for v in values.values()], "o-", color=colors[name], markersize=3
        )
    axes.set(title=TITLES[group.evaluator], xlabel="largest change of a pixel, 1/255", ylabel="top-1, %")
    axes.set_ylim(bottom=0)
