"""All studies that have results, as one Markdown page made of artifacts alone: `nst study --results FILE`.

Of every number the page says from which recipe and seeds it is, when its runs were made, how long they took and by which code. What
was not run is listed as that.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flows.studies import Grid, Study, Variant, load_study, make_grid, shipped_studies
from flows.study_pages import RULE, cell_text, missing_lines, question_lines, table_lines
from flows.study_runs import read_measurements
from flows.study_table import Measurements, Row, make_rows, summary
from storage.artifacts import Manifest
from storage.objects import Store
from storage.runs import list_experiments
from tasks.inspection.facts import code_of

HOUR_S = 3600
MADE_COLUMNS = ("row", "recipe", "seeds", "made", "hours of work", "device", "code", "networks")


@dataclass(frozen=True)
class StudyResult:
    """A study at a scale with its rows, of which at least one has a number."""

    grid: Grid
    rows: list[Row]
    measured: Measurements


@dataclass(frozen=True)
class Results:
    """The studies that have results, and those that have none with their scale."""

    found: list[StudyResult]
    not_run: list[tuple[Study, str]]


def find_results(stores: Sequence[Store], overrides: Sequence[str] = (), seeds: int = 0) -> Results:
    """Look every shipped study up at each of its scales; of several stores the first counts that has a number of it.

    `overrides`: those with which the studies were run; `seeds`: 0 means all that were run. Runs nothing. Raises UserError as
    `make_grid` does.
    """
    experiments = {store.url: list_experiments(store) for store in stores}
    results = Results([], [])
    for path in shipped_studies():
        study = load_study(path.stem)
        for scale in study.scales:
            for store in stores:
                result = _result(study, scale, store, overrides, seeds or _num_seeds(study, experiments[store.url]))
                if result is not None:
                    results.found.append(result)
                    break
            else:
                results.not_run.append((study, scale))
    return results


def results_page(results: Results, command: str) -> str:
    """The page: an overview, a section a study, what was not run. `command`: what a person types to make it again."""
    lines = [
        "# Results",
        "",
        f"Made by `{command}` from the artifacts of a store; nothing here is written by hand. {RULE}",
        "",
        "| study | paper | scale | directions |",
        "|---|---|---|---|",
    ]
    for result in results.found:
        study, scale = result.grid.study, result.grid.scale_name
        anchor = f"[{study.name}](#{_anchor(_title(result))})"
        lines.append(f"| {anchor} | {study.paper} | {scale} | {cell_text(summary(result.rows).partition(': ')[2])} |")
    for result in results.found:
        lines += ["", f"## {_title(result)}", "", *question_lines(result.grid), "", *table_lines(result.rows), ""]
        lines += [*missing_lines(result.rows, []), *_made_lines(result)]
    if results.not_run:
        lines += ["", "## Not run", ""]
        lines += [
            f"* `{study.name}` ({study.paper}) at scale `{scale}`: {study.title}" for study, scale in results.not_run
        ]
    return "\n".join(lines) + "\n"


def _result(study: Study, scale: str, store: Store, overrides: Sequence[str], seeds: int) -> StudyResult | None:
    """The study at a scale in a store; None where it has no number of it."""
    if not seeds:
        return None
    grid = make_grid(study, scale, seeds, overrides)
    measured = read_measurements(grid, store)
    rows = make_rows(grid, measured)
    return StudyResult(grid, rows, measured) if any(row.mean is not None for row in rows) else None


def _num_seeds(study: Study, experiments: Sequence[str]) -> int:
    """How many seeds, from 0 on, hold all runs of a study that are among the experiments; 0 where there is none."""
    pattern = re.compile(rf"study-{re.escape(study.name)}-.+-seed(\d+)")
    return max((int(match[1]) + 1 for name in experiments if (match := pattern.fullmatch(name))), default=0)


def _made_lines(result: StudyResult) -> list[str]:
    """Where each row's numbers come from, and the work that all of them took together, each artifact counted once."""
    variants = result.grid.scale.variants
    distinct = {m.key: m for made in result.measured.artifacts.values() for m in made}
    total = sum(_seconds(m) for m in distinct.values())
    return [
        "Where the numbers come from: the work of a row is that of all its runs' artifacts, those that rows share included.",
        "",
        f"| {' | '.join(MADE_COLUMNS)} |",
        f"|{'---|' * len(MADE_COLUMNS)}",
        *(
            f"| {' | '.join(map(cell_text, _made(result, v, row)))} |"
            for v, row in zip(variants, result.rows, strict=True)
        ),
        "",
        f"{len(distinct):,} distinct artifacts, {total / HOUR_S:.2f} hours of work.",
    ]


def _made(result: StudyResult, variant: Variant, row: Row) -> tuple[str, ...]:
    """A row's cells of MADE_COLUMNS, of the seeds that have a number."""
    scale = result.grid.scale
    owner = scale.owner(variant)
    seeds = [seed for seed, value in enumerate(row.values) if value is not None]
    made = [m for seed in seeds for m in result.measured.artifacts.get((owner.name, seed), ())]
    dates = sorted({str(m.provenance.get("created", "unknown"))[:10] for m in made})
    return (
        row.label,
        owner.recipe or scale.recipe,
        ", ".join(map(str, seeds)) or "-",
        " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "-",
        f"{sum(map(_seconds, made)) / HOUR_S:.2f}" if made else "-",
        _each(str(m.provenance.get("device", "unknown")) for m in made),
        _each(code_of(m) or "unknown" for m in made),
        ", ".join(key[:12] for key in row.keys) or "-",
    )


def _seconds(manifest: Manifest) -> float:
    return float(manifest.provenance.get("seconds", 0.0))


def _each(words: Iterable[str]) -> str:
    return ", ".join(sorted(set(words))) or "-"


def _title(result: StudyResult) -> str:
    return f"{result.grid.study.name}: {result.grid.study.title} ({result.grid.scale_name})"


def _anchor(title: str) -> str:
    """What a heading is called in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
