"""`nst study`: a table or figure of the paper as a grid of runs, with a table beside the paper's numbers at the end.

nst study                                          what studies there are
nst study noise --plan data.root=FOLDER            what one would make, what its variants share, what it costs
nst study noise data.root=FOLDER --out docs        run it (again: go on), write docs/noise-cifar10.md and .png
nst study noise data.root=FOLDER --show            the table again, from the store
nst study --results FILE                           one page of all studies that the store has results of

Listing, `--plan`, `--show` and `--results` load neither torch nor Prefect. The runs go without Prefect.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flows.experiment import DEFAULT_STORE
from flows.studies import DEFAULT_SCALE, Grid, GridRun, load_study, make_grid, shipped_studies
from flows.study_pages import (
    failure_lines,
    list_table,
    markdown_page,
    picture,
    plan_lines,
    plan_table,
    results_table,
    study_json,
)
from flows.study_results import find_results, results_page
from flows.study_runs import count_together, plan_study, read_measurements, run_study
from flows.study_table import Failure, Row, make_rows, summary
from flows.terminal import EXIT_FAILED, JsonOption, StoreOption, console, errors
from storage.errors import UserError
from storage.objects import Store
from tasks.stage import DoStage


def study(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="A shipped study or a YAML file; none: list them.")
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted overrides of all runs, e.g. data.root=F.")
    ] = None,
    scale: Annotated[str, typer.Option(help="cifar10 (one machine) or imagenet (the paper's own).")] = DEFAULT_SCALE,
    seeds: Annotated[int, typer.Option(min=0, help="Seeds 0 to N-1; 0: as many as the study says.")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Count what would be made; do nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="The table of what the store has; run nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write NAME-SCALE.md and .png into this folder.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Write one page of all studies with results, at any scale; run nothing.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="With --results: a further store, looked into after --store.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Run a table or figure of the paper as a grid of runs, and print it beside the paper's numbers.

    Example: nst study noise data.root=FOLDER --out docs/studies
    """
    if results is not None:
        _write_results(results, [name, *(overrides or [])] if name else [], [store, *(also or [])], seeds)
        return
    if not name:
        _list_studies(scale, as_json)
        return
    if "=" in name:
        raise UserError(f"{name!r} is an override; name the study first: nst study NAME {name}")
    grid = make_grid(load_study(name), scale, seeds, overrides or ())  # a typo ends here, before anything is touched
    if plan and (show or out):
        raise UserError("--plan makes nothing to be shown or written; leave out --show and --out, or --plan")
    opened = Store(store)
    if plan:
        _show_plan(grid, opened, as_json)
        return
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out")
    failures = [] if show else run_study(grid, opened, _do_stage(as_json), _announce)
    command = _command(name, grid, store, seeds)
    rows = make_rows(grid, read_measurements(grid, opened))
    _show_rows(grid, rows, failures, command, as_json)
    if out is not None:
        _write(grid, rows, failures, out, command)
    if failures:
        raise typer.Exit(EXIT_FAILED)


def _list_studies(scale: str, as_json: bool) -> None:
    """Every shipped study at a scale; reuse is counted from the settings, without data."""
    grids = [make_grid(load_study(path.stem), scale) for path in shipped_studies()]
    rows = [(grid.study, scale, plan_study(grid, None)) for grid in grids]
    if as_json:
        listed = [{"study": s.name, "paper": s.paper, "title": s.title, **asdict(plan)} for s, _, plan in rows]
        print(json.dumps(listed, indent=1))
        return
    console.print(list_table(rows))
    runs, stages, distinct = count_together(grids)
    _say(f"scale {scale}; stages: of all runs; distinct: artifacts to be made, each once")
    _say(f"all in one store: {runs} runs of {stages} stages need {distinct} distinct artifacts")


def _show_plan(grid: Grid, store: Store, as_json: bool) -> None:
    plan = plan_study(grid, store)
    if as_json:
        print(json.dumps(study_json(grid, plan=asdict(plan)), indent=1))
        return
    _say(
        f"{grid.study.title} ({grid.study.paper}), scale {grid.scale_name}, {grid.seeds} {'seed' if grid.seeds == 1 else 'seeds'}"
    )
    _say(f"paper: {grid.study.finding.strip()}")
    _say(f"here: {grid.scale.about.strip()}")
    console.print(plan_table(plan))
    for line in plan_lines(plan):
        _say(line)


def _show_rows(grid: Grid, rows: Sequence[Row], failures: Sequence[Failure], command: str, as_json: bool) -> None:
    """The table, what failed and what is missing; failures go to the error stream too, where JSON is printed."""
    if as_json:
        lines = [asdict(failure) for failure in failures]
        print(json.dumps(study_json(grid, rows=[row.as_json() for row in rows], failures=lines), indent=1))
    else:
        console.print(results_table(grid, rows))
        _say(summary(rows))
        for row in rows:
            for note in row.notes:
                _say(f"{row.name}: {note}")
        _say(f"again:  {command} --show")
    for line in failure_lines(failures):
        errors.print(f"[red]failed:[/] {escape(line)}", highlight=False)
    if failures:
        errors.print("the others ended well; the same command tries the failed ones again", highlight=False)


def _write(grid: Grid, rows: Sequence[Row], failures: Sequence[Failure], folder: Path, command: str) -> None:
    """The page and its picture, over those of an earlier call."""
    stem = f"{grid.study.name}-{grid.scale_name}"
    page = markdown_page(grid, rows, failures, f"{stem}.png", command)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.png").write_bytes(picture(grid, rows))
        (folder / f"{stem}.md").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); give another folder with --out") from error
    errors.print(f"page: {(folder / f'{stem}.md').absolute()}", highlight=False, markup=False)


def _write_results(file: Path, overrides: Sequence[str], stores: Sequence[str], seeds: int) -> None:
    """The page of all results, over that of an earlier call."""
    named = [text for text in overrides if "=" not in text]
    if named:
        raise UserError(f"--results writes the results of all studies; leave out {named[0]}")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is no folder; make it first, or give another place with --results")
    found = find_results([Store(url) for url in stores], overrides, seeds)
    if not found.found:
        raise UserError(
            f"no study has results in {', '.join(stores)}; run one first, e.g. nst study noise data.root=FOLDER, and give "
            "the overrides with which it was run"
        )
    options = [*overrides, *(["--seeds", str(seeds)] if seeds else [])]
    command = shlex.join(["nst", "study", "--results", str(file), *options])
    file.write_text(results_page(found, command), encoding="utf-8")
    errors.print(f"page: {file.absolute()}", highlight=False, markup=False)


def _command(name: str, grid: Grid, store: str, seeds: int) -> str:
    """What a person types to see this again, but for --show."""
    options = [*grid.overrides, "--scale", grid.scale_name, *(["--seeds", str(seeds)] if seeds else [])]
    return shlex.join(["nst", "study", name, *options, "--store", store])


def _do_stage(as_json: bool) -> DoStage:
    """How a stage is carried out: shown while it works; where JSON is printed, on the error stream."""
    from flows.console import PlainDisplay, make_display, shown
    from tasks.stage import run_stage

    display = PlainDisplay(lambda line: errors.print(line, markup=False)) if as_json else make_display(console)
    return lambda request: shown(request, display, lambda: run_stage(request, display.progress))


def _announce(run: GridRun, number: int, total: int) -> None:
    errors.print(f"[bold]{run.experiment.name}[/] (run {number} of {total})", highlight=False)


def _say(text: str) -> None:
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
