"""What a person sees while a run works: stage, done / total, images/s, time left; and the tables at the end."""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from flows.plan import PlannedSelection
from tasks.inspection.facts import artifact_facts
from tasks.results import gains
from tasks.selection.rules import DECISIONS
from tasks.stage import StageOutcome, StageRequest

PLAIN_INTERVAL_S = 10.0
EXTREME_CLASSES = 5  # of either kind, shown of a planned selection
TRAINING_FACTS = {
    "loss_labeled": "loss {:.3f}",
    "loss_unlabeled": "unlabeled {:.3f}",
    "agreement": "agreement {:.0%}",
    "val_top1": "val {:.1%}",
    "learning_rate": "rate {:.2g}",
}
CLASS_COUNTS = ("available", "kept", "dropped", "duplicated", "copies")


class Display(Protocol):
    """Shows a run. One stage at a time."""

    def stage_started(self, name: str) -> None:
        """A stage begins."""

    def progress(self, progress: dict[str, Any]) -> None:
        """`done` of `total` `unit` (images)."""

    def note(self, line: str) -> None:
        """Something that a person should know while the stage goes on."""

    def stage_ended(self, name: str, outcome: StageOutcome | None) -> None:
        """The stage is over; None where it failed."""


class Pace:
    """How fast a stage goes, since its first report; since a later one where it begins to count anew."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None
        self._done = 0

    def rate(self, progress: dict[str, Any], now: float) -> float | None:
        """Units a second at a report; None at the first one."""
        done = progress["done"]
        if self._since is None or done < self._done:
            self._since = now, done
        self._done = done
        started, first = self._since
        return (done - first) / (now - started) if now > started else None


class PlainDisplay:
    """Lines of text, for logs and pipes: a stage's start, a line every ten seconds, its end."""

    def __init__(self, write: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
        self._write = write
        self._name, self._pace, self._last = "", Pace(), 0.0

    def stage_started(self, name: str) -> None:
        """Say which stage begins."""
        self._name, self._pace, self._last = name, Pace(), time.monotonic()

    def progress(self, progress: dict[str, Any]) -> None:
        """A line now and then."""
        now = time.monotonic()
        rate = self._pace.rate(progress, now)
        if now - self._last < PLAIN_INTERVAL_S or rate is None:
            return
        self._last = now
        self._write(f"{self._name}: {progress_line(progress, rate)}")

    def note(self, line: str) -> None:
        """One line."""
        self._write(line)

    def stage_ended(self, name: str, outcome: StageOutcome | None) -> None:
        """One line with what came out."""
        mark = "" if outcome is None or not outcome.reused else "reused "
        self._write(f"{name}: {mark}{describe(outcome) if outcome else 'failed'}")


class _RateColumn(ProgressColumn):
    def render(self, task: Any) -> Text:
        """Units a second."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="cyan")


class RichDisplay:
    """A live progress bar for a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[facts]}"),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task: TaskID | None = None

    def stage_started(self, name: str) -> None:
        """Show the stage with an empty bar."""
        self._progress.start()
        self._task = self._progress.add_task(f"{name:<12}", total=None, unit="images", facts="")

    def progress(self, progress: dict[str, Any]) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(
                self._task,
                completed=progress["done"],
                total=progress["total"],
                unit=progress["unit"],
                facts=training_facts(progress),
            )

    def note(self, line: str) -> None:
        """One line above the bar."""
        self._console.print(escape(line), highlight=False, soft_wrap=True)

    def stage_ended(self, name: str, outcome: StageOutcome | None) -> None:
        """Replace the bar by one line."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._progress.stop()
        mark = "[red]failed" if outcome is None else "[dim]reused[/] " if outcome.reused else "[green]done[/]   "
        self._console.print(f"{name:<12} {mark} {describe(outcome) if outcome else ''}", highlight=False, no_wrap=True)


def progress_line(progress: dict[str, Any], rate: float | None) -> str:
    """How far a stage is, how fast it goes and how long it still takes, and what a training says of itself."""
    total, unit = progress["total"], progress["unit"]
    done = min(progress["done"], total)  # a selection counts its last shard as full
    speed = f", {rate:.0f} {unit}/s" if rate else ""
    left = f", {_duration((total - done) / rate)} left" if rate and done < total else ""
    facts = training_facts(progress)
    return f"{done} of {total} {unit}{speed}{left}{facts and '; ' + facts}"


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def training_facts(progress: dict[str, Any]) -> str:
    """What a training says of itself, in a few words; empty for other stages."""
    return ", ".join(text.format(progress[name]) for name, text in TRAINING_FACTS.items() if name in progress)


def shown(request: StageRequest, display: Display, work: Callable[[], StageOutcome]) -> StageOutcome:
    """Do a stage between its start and its end on the display."""
    outcome = None
    display.stage_started(request.record.name)
    try:
        outcome = work()
        return outcome
    finally:
        display.stage_ended(request.record.name, outcome)


def make_display(console: Console) -> Display:
    """A live display in a terminal, lines elsewhere."""
    return RichDisplay(console) if sys.stdout.isatty() else PlainDisplay()


def describe(outcome: StageOutcome) -> str:
    """One line on what a stage made."""
    manifest = outcome.manifest
    seconds = "" if outcome.reused else f" in {manifest.provenance['seconds']:.0f} s"
    return f"{manifest.kind} {manifest.key[:12]}: {artifact_facts(manifest)}{seconds}"


def results_table(records: list[dict[str, Any]], title: str) -> Table:
    """The table of a run, one row a model."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    with_top5 = any(record["top5"] is not None for record in records)
    others = list(dict.fromkeys(title for record in records for title in record["others"]))
    top5 = ("top-5",) if with_top5 else ()
    names = ("model", "top-1", *top5, "gain", *others, "kept", "dropped", "duplicated")
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for record, gain in zip(records, gains(records), strict=True):
        shares = [_percent(record["top1"]), *([_percent(record["top5"])] if with_top5 else [])]
        counts = ["-" if record[name] is None else f"{record[name]:,}" for name in ("kept", "dropped", "duplicated")]
        robust = [_percent(record["others"].get(title)) for title in others]
        table.add_row(record["ref"], *shares, "" if gain is None else f"{100 * gain:+.2f}", *robust, *counts)
    return table


def planned_selection(name: str, planned: PlannedSelection) -> Group:
    """What a selection will do: the sums, and the classes that lose and that repeat the most."""
    if planned.problem:
        return Group(f"{name} [red]will fail[/]: {escape(planned.problem)}")
    classes = planned.classes
    total = {field: sum(row[field] for row in classes) for field in (*CLASS_COUNTS, *DECISIONS)}
    dropped = ", ".join(f"{total[d]:,} {d.replace('_', ' ')}" for d in DECISIONS if d != "kept" and total[d])
    sums = (
        f"{name} will keep {total['kept']:,} of {total['available']:,} images, drop {total['dropped']:,}"
        f"{f' ({dropped})' if dropped else ''}, duplicate {total['duplicated']:,}: {total['copies']:,} in all; "
        f"{sum(not row['kept'] for row in classes):,} of {len(classes):,} classes stay empty"
    )
    by_loss = sorted(classes, key=lambda row: (-row["dropped"], row["label"]))
    by_repeats = sorted(classes, key=lambda row: (-row["duplicated"] / max(row["kept"], 1), row["label"]))
    shown = list(classes)
    if len(classes) > 2 * EXTREME_CLASSES:
        lose, repeat = by_loss[:EXTREME_CLASSES], by_repeats[:EXTREME_CLASSES]
        shown = [*lose, *(row for row in repeat if row not in lose)]
    table = Table(box=None)
    for column in ("class", *CLASS_COUNTS):
        table.add_column(column, justify="left" if column == "class" else "right", no_wrap=True)
    for row in shown:
        table.add_row(escape(row["class_name"]), *(f"{row[field]:,}" for field in CLASS_COUNTS))
    left_out = len(classes) - len(shown)
    return Group(sums, table, *([f"and {left_out:,} classes between them (all: --json)"] if left_out else []))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
