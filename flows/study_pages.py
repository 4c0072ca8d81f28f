"""How a study is shown: on the terminal, as a Markdown page, as a picture. Numbers come from `flows/study_table.py`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from flows.studies import Grid, Study
from flows.study_runs import StudyPlan
from flows.study_table import Failure, Row, summary

STYLES = {"yes": "green", "no": "red", "within error": "yellow"}
COLUMNS = ("row", "paper", "here", "paper's difference", "difference here", "against", "reproduces")
LEFT = ("row", "measure", "against", "reproduces")  # columns of words
RULE = (
    "Ours: mean ± standard error over the seeds; differences are taken seed by seed. A direction is judged where the "
    "difference is clear of chance (Student's t, 95 %); otherwise it is within error."
)


def list_table(rows: Sequence[tuple[Study, str, StudyPlan]]) -> Table:
    """All studies at a scale: what they need and how much of it they share."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("study", "paper", "question", "rows", "runs", "stages", "distinct", "reused"):
        right = name in ("rows", "runs", "stages", "distinct", "reused")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "question")
    for study, scale, plan in rows:
        reused = 1 - plan.distinct / plan.stages
        counts = (len(study.at(scale).variants), plan.runs, plan.stages, plan.distinct)
        table.add_row(study.name, study.paper, escape(study.title), *map(str, counts), f"{reused:.0%}")
    return table


def plan_table(plan: StudyPlan) -> Table:
    """A study's variants: the artifacts that their seeds need."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("variant", "artifacts", "shared with others", "in the store", "to be made"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in plan.variants:
        table.add_row(row.name, str(row.stages), str(row.shared), str(row.present), str(row.missing))
    return table


def plan_lines(plan: StudyPlan) -> list[str]:
    """A plan's sums in words."""
    missing = ", ".join(f"{number} {stage}" for stage, number in plan.missing.items())
    lines = [
        f"{plan.runs} runs of {plan.stages} stages need {plan.distinct} distinct artifacts, {plan.shared} of them shared by two "
        f"variants or more",
        f"{plan.present} are in the store, {sum(plan.missing.values())} have to be made{f': {missing}' if missing else ''}",
    ]
    if plan.note:
        lines[1] = f"to be made: {missing}. {plan.note[0].upper()}{plan.note[1:]}"
    if plan.gpu_days is not None:
        left = (
            "" if plan.gpu_days_missing == plan.gpu_days else f", {_days(plan.gpu_days_missing)} of it not in the store"
        )
        lines.append(f"estimated cost: {_days(plan.gpu_days)}{left} (the rule: flows/study_cost.py)")
    return lines


def results_table(grid: Grid, rows: Sequence[Row]) -> Table:
    """The study's table for a terminal."""
    study = grid.study
    columns = _columns(rows)
    unit = "" if "measure" in columns else f": {rows[0].measure}"
    title = f"{study.title} ({study.paper}), scale {grid.scale_name}{unit}"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT else "right")
    for row in rows:
        style = STYLES.get(row.verdict)
        verdict = f"[{style}]{row.verdict}[/]" if style else row.verdict
        table.add_row(*map(escape, _cells(row, columns)[:-1]), verdict)
    return table


def markdown_page(grid: Grid, rows: Sequence[Row], failures: Sequence[Failure], picture: str, command: str) -> str:
    """The study as a page: question, finding, settings, table, picture, and which artifacts the numbers are of."""
    lines = [
        f"# {grid.study.title}",
        "",
        *question_lines(grid),
        "",
        RULE,
        "",
        *table_lines(rows),
        "",
        f"![Differences, the paper's and ours]({picture})",
        "",
        *missing_lines(rows, failures),
        f"Made by `{command}`. Measured networks, by seed:",
        "",
        *(f"* {row.name} ({row.network}): {', '.join(key[:12] for key in row.keys) or 'none'}" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def question_lines(grid: Grid) -> list[str]:
    """What the paper found and what is run here, as Markdown."""
    study, scale = grid.study, grid.scale
    recipe = f"`{scale.recipe}`{f' at its scale `{scale.recipe_scale}`' if scale.recipe_scale else ''}"
    return [
        f"The paper's {study.paper}. It found: {study.finding.strip()}",
        "",
        f"Here: {scale.about.strip()} Recipe {recipe}, seeds 0 to {grid.seeds - 1}.",
    ]


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The table with what its numbers are and what it says in sum, as Markdown."""
    columns = _columns(rows)
    unit = "are what the column `measure` says" if "measure" in columns else f"are {rows[0].measure}"
    return [
        f"Numbers {unit}.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---' if name in LEFT else '--:' for name in columns)}|",
        *(f"| {' | '.join(map(cell_text, _cells(row, columns)))} |" for row in rows),
        "",
        f"{summary(rows)}.",
    ]


def picture(grid: Grid, rows: Sequence[Row]) -> bytes:
    """PNG: each row's difference from the row that it is compared with, the paper's and ours."""
    from tasks.report_figures import LIGHT, study_differences

    compared = [row for row in rows if row.against]
    columns = ("paper_difference", "difference", "difference_error")
    paper, ours, errors = (np.array([_or_nan(getattr(row, name)) for row in compared]) for name in columns)
    single = len({row.against for row in compared}) == 1
    names = [row.label if single else f"{row.label} against {_label(rows, row.against)}" for row in compared]
    beside = f" against {_label(rows, compared[0].against)}" if single else ""
    unit = "each row's own measure" if "measure" in _columns(rows) else rows[0].measure
    return study_differences(LIGHT, names, paper, ours, errors, f"difference{beside}: {unit}")


def failure_lines(failures: Sequence[Failure]) -> list[str]:
    """A line a failed run: which, and its first cause."""
    return [f"{f.variant}, seed {f.seed}: {f.cause.strip().splitlines()[0]}" for f in failures]


def cell_text(text: str) -> str:
    """A cell of a Markdown table."""
    return text.replace("|", "\\|")


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The table's columns; where rows have several metrics, each says which."""
    mixed = len({row.measure for row in rows}) > 1
    return (COLUMNS[0], "measure", *COLUMNS[1:]) if mixed else COLUMNS


def _cells(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    num = sum(value is not None for value in row.values)
    difference = _with_error(row.difference, row.difference_error, row.digits, "+")
    cells = {
        "row": row.label,
        "measure": row.measure,
        "paper": "-" if row.paper is None else f"{row.paper:.1f}",
        "here": _with_error(row.mean, row.error, row.digits, "") + (f" (n={num})" if num else ""),
        "paper's difference": row.paper_direction or ""
        if row.paper_difference is None
        else f"{row.paper_difference:+.1f}",
        "difference here": difference if row.against else "",
        "against": row.against,
        "reproduces": row.verdict,
    }
    return tuple(cells[name] for name in columns)


def _with_error(value: float | None, error: float | None, digits: int, sign: str) -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def missing_lines(rows: Sequence[Row], failures: Sequence[Failure]) -> list[str]:
    """What a reader of a page must know of numbers that are not there, as Markdown."""
    lines = [f"* failed: {line}" for line in failure_lines(failures)]
    lines += [f"* {row.name}: {note}" for row in rows for note in row.notes]
    return ["Missing:", "", *lines, ""] if lines else []


def _label(rows: Sequence[Row], name: str) -> str:
    return next(row.label for row in rows if row.name == name)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _days(days: float | None) -> str:
    if days is None:
        return "unknown"
    return f"{days:,.0f} GPU-days" if days >= 10 else f"{days:.2g} GPU-days"


def study_json(grid: Grid, **parts: Any) -> dict[str, Any]:
    """What programs read: the study's identity and the given parts."""
    study = grid.study
    return {
        "study": study.name,
        "paper": study.paper,
        "scale": grid.scale_name,
        "seeds": grid.seeds,
        "metric": study.metric.model_dump(),
        **parts,
    }
