"""What the terminal shows of one evaluation, and of several models beside each other."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from storage.artifacts import Manifest
from tasks.comparison.compare import Group, Measure, Pair


def evaluation_table(evaluation: Manifest) -> Table:
    """Its numbers: by corruption and severity, by epsilon, by perturbation, or by split."""
    metrics = evaluation.metrics
    for field, make in (("errors", _errors), ("flips", _flips), ("accuracy", _accuracy)):
        if field in metrics:
            return make(metrics)
    return _plain(metrics)


def _errors(metrics: dict[str, Any]) -> Table:
    severities = list(next(iter(metrics["errors"].values())))
    ces = metrics.get("corruption_errors", {})
    columns = ["corruption", *severities, "mean", *(["CE"] if ces else [])]
    table = _table(f"error in %, {metrics['images']:,} images", *columns)
    for kind, own in metrics["errors"].items():
        last = [f"{100 * ces[kind]:.1f}"] if ces else []
        cells = [*(percent(own[severity]) for severity in severities), percent(metrics["mean_errors"][kind]), *last]
        table.add_row(kind, *cells)
    mce = [f"{metrics['mce']:.1f}"] if ces else []
    table.add_row("all", *("" for _ in severities), percent(metrics["mean_error"]), *mce, style="bold")
    return table


def _flips(metrics: dict[str, Any]) -> Table:
    table = _table(f"{metrics['images']:,} sequences", "perturbation", "flips, %", "top-5 distance")
    for kind, flip in metrics["flips"].items():
        table.add_row(kind, percent(flip), f"{metrics['top5_distances'][kind]:.3f}")
    table.add_row("all", percent(metrics["mean_flip"]), f"{metrics['mean_top5_distance']:.3f}", style="bold")
    return table


def _accuracy(metrics: dict[str, Any]) -> Table:
    table = _table(f"{metrics['images']:,} images", "largest change of a pixel, 1/255", "top-1, %")
    for epsilon, value in metrics["accuracy"].items():
        table.add_row(epsilon, percent(value))
    return table


def _plain(metrics: dict[str, Any]) -> Table:
    splits = {name: own for name, own in metrics.items() if isinstance(own, dict) and "top1" in own} or {"": metrics}
    table = _table(None, "", "images", "top-1, %", "top-5, %", "calibration error, %", "right by several labels, %")
    for name, own in splits.items():
        shares = (percent(own.get(field)) for field in ("top1", "top5", "ece", "real_top1"))
        table.add_row(name, f"{own['images']:,}", *shares)
    return table


def comparison_tables(groups: Sequence[Group], models: Sequence[str]) -> list[Table | str]:
    """One table of all numbers, the best of each row in bold; then who is significantly better."""
    table = _table(None, "", *models)
    lines: list[Table | str] = [table]
    for group in groups:
        table.add_section()
        table.add_row(f"[bold]{escape(group.evaluator)}[/] [dim]{escape(group.of)}[/]", *("" for _ in models))
        for measure in group.measures:
            table.add_row(f"  {escape(measure.name)}", *(_cell(measure, name) for name in models))
    for group in groups:
        lines += [f"{group.evaluator}: {_verdict(pair)}" for pair in group.pairs]
    return lines


def _cell(measure: Measure, model: str) -> str:
    value = measure.values.get(model)
    if value is None:
        return "-"
    interval = measure.interval(model)
    text = measure.number(model) + (f" [dim]({interval})[/]" if interval else "")
    choose = max if measure.better == "larger" else min
    best = choose(other.value for other in measure.values.values())
    return f"[bold]{text}[/]" if len(measure.values) > 1 and value.value == best else text


def _verdict(pair: Pair) -> str:
    """One line on two models: the difference, its interval, the chance, the images."""
    told = f"{pair.better} is significantly better" if pair.better else "no significant difference"
    return (
        f"{pair.b} less {pair.a}: {100 * pair.difference:+.2f} points ({100 * pair.low:+.2f} to {100 * pair.high:+.2f}), "
        f"{pair.won:,} images won, {pair.lost:,} lost, {pair.test} p {pair.chance:.2g}: {told}"
    )


def percent(value: float | None) -> str:
    """A share as a percentage; - where there is none."""
    return "-" if value is None else f"{100 * value:.2f}"


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table
