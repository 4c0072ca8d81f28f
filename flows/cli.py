"""The command `nst`. Heavy libraries load in the commands that need them: `plan`, `ls`, `results` load none.

nst demo                                a whole experiment on real digits, minutes on a CPU
nst plan digits student.epochs=40       what would run, and why
nst run birds.yaml --scale smoke            an experiment of your own, small
nst serve                               Prefect's server, a worker and all deployments on this machine
"""

import json
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Table

from flows import (
    automations,
    evaluation_commands,
    inspect_commands,
    join_command,
    lineage_command,
    serve,
    store_commands,
    study_commands,
)
from flows.driver import Rerun, Run, find_node, resolve_run
from flows.experiment import DEFAULT_STORE, load_experiment
from flows.next import next_run
from flows.prefect_mode import PrefectMode, PrefectOption, set_up_prefect
from flows.terminal import (
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    JsonOption,
    StoreOption,
    app,
    console,
    errors,
)
from models.failures import WorkerFailed
from models.launch import code_state, warm_up
from storage.artifacts import find
from storage.errors import UserError, explained
from storage.objects import Store
from storage.runs import latest_run, read_run
from tasks.results import result_records

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one, such as digits.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, e.g. student.epochs=30.")]
RerunOption = Annotated[str, typer.Option(help="Make a stage and all that follows anew: select, or 2/select.")]
ScaleOption = Annotated[str, typer.Option(help="A scale that the recipe offers, e.g. smoke.")]


def demo(store: StoreOption = "demo-store", prefect: PrefectOption = PrefectMode.ephemeral) -> None:
    """Run two iterations on real digits, from 100 labels: minutes on a CPU.

    Example: nst demo --store demo-store
    """
    run("digits", None, store, "nothing", "", prefect)


def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    store: StoreOption = DEFAULT_STORE,
    rerun: RerunOption = "nothing",
    scale: ScaleOption = "",
    prefect: PrefectOption = PrefectMode.ephemeral,
) -> None:
    """Run an experiment; what is in the store already is reused.

    Example: nst run birds.yaml student.epochs=100 --store s3://team/nst
    """
    from flows.console import make_display

    choice = Rerun.parse(rerun)
    experiment = load_experiment(recipe, overrides or (), scale)  # a typo ends here, before Prefect starts
    store_root = Store(store)
    store_root.check_writable()
    join_command.say_where(experiment.compute)
    display = make_display(console)
    if prefect is PrefectMode.off:
        name = _run_plain(resolve_run(experiment, recipe, store_root, choice), display)
    else:
        if experiment.compute.engine == "local" and latest_run(store_root, experiment.name) is None:
            warm_up()  # networks will be trained here: torch loads while Prefect does
        wait_for_api = set_up_prefect(prefect)
        from flows.iteration import noisy_student, recipe_parameters, show_on

        show_on(display)
        wait_for_api()
        name = noisy_student(
            **recipe_parameters(recipe),
            overrides=overrides or [],
            scale=scale,
            store=store_root.url,
            rerun=cast(Any, choice.role or "nothing"),
            rerun_iteration=-1 if choice.iteration is None else choice.iteration,
        )
    _print_end_of_run(store_root, name, store)


def next_iteration(
    experiment: Annotated[str, typer.Argument(help="The name of an experiment with a finished run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the new iteration, e.g. student.batch_ratio=28.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    prefect: PrefectOption = PrefectMode.ephemeral,
) -> None:
    """Add an iteration to an experiment's newest finished run, taught by its latest student; all else is reused.

    Example: nst next digits student.epochs=300
    """
    from flows.console import make_display

    store_root = Store(store)
    run = next_run(store_root, experiment, overrides or ())  # a typo ends here, before Prefect starts
    join_command.say_where(run.experiment.compute)
    display = make_display(console)
    if prefect is PrefectMode.off:
        name = _run_plain(run, display)
    else:
        wait_for_api = set_up_prefect(prefect)
        from flows import iteration

        iteration.show_on(display)
        wait_for_api()
        name = iteration.next_iteration(experiment, overrides or [], store_root.url)
    _print_end_of_run(store_root, name, store)


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    store: StoreOption = DEFAULT_STORE,
    rerun: RerunOption = "nothing",
    scale: ScaleOption = "",
    as_json: JsonOption = False,
) -> None:
    """Print what a run would do and why, without doing anything; of a selection, what each class keeps, drops, duplicates.

    Example: nst plan digits select.min_confidence=0.7
    """
    from flows.console import planned_selection
    from flows.plan import make_plan

    experiment = load_experiment(recipe, overrides or (), scale)
    rows = make_plan(resolve_run(experiment, recipe, Store(store), Rerun.parse(rerun)))
    if as_json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
        return
    table = Table(box=None)
    for name in ("stage", "key", "", "why"):
        table.add_column(name)
    for row in rows:
        style = "green" if row.status == "reused" else "yellow"
        table.add_row(row.name, row.key[:12], f"[{style}]{row.status}[/]", escape("; ".join(row.reasons)))
    console.print(table)
    for row in rows:
        if row.selection is not None:
            console.print(planned_selection(row.name, row.selection), highlight=False)
        if row.problem is not None:
            console.print(f"{row.name} [red]will fail[/]: {escape(row.problem)}", highlight=False, soft_wrap=True)
    num_running = sum(row.status != "reused" for row in rows)
    console.print(
        f"{num_running} of {len(rows)} stages would run, {len(rows) - num_running} are reused", highlight=False
    )


def results(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="An experiment (its newest run) or EXPERIMENT/N.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Print the table of a run: one record a model.

    Example: nst results digits --json --store demo-store
    """
    _print_results(Store(store), run_name, as_json)


def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="prepare, report, or ITERATION/ROLE such as 2/select.")],
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    store: StoreOption = DEFAULT_STORE,
    scale: ScaleOption = "",
    prefect: PrefectOption = PrefectMode.ephemeral,
) -> None:
    """Run one stage of an experiment; its inputs must be in the store.

    Example: nst stage 1/select digits
    """
    from flows.console import make_display

    experiment = load_experiment(recipe, overrides or (), scale)
    find_node(resolve_run(experiment, recipe, Store(store), Rerun()), name)  # a wrong name ends here
    join_command.say_where(experiment.compute)
    if prefect is PrefectMode.off:
        _stage_plain(name, recipe, overrides or [], Store(store), scale)
        return
    wait_for_api = set_up_prefect(prefect)
    from flows.iteration import recipe_parameters, show_on
    from flows.stages import STAGE_FLOWS

    iteration, _, role = name.rpartition("/")
    show_on(make_display(console))
    wait_for_api()
    STAGE_FLOWS[role](
        **recipe_parameters(recipe),
        iteration=int(iteration or 0),
        overrides=overrides or [],
        scale=scale,
        store=Store(store).url,
    )


def main() -> None:
    """Entry of the command: one line for a mistake of the user's, the cause for everything else."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        code = app(standalone_mode=False)
        if code == EXIT_FAILED:
            sys.exit(code)
        if code:  # typer turns an interrupt into an exit code
            raise KeyboardInterrupt
    except UserError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(EXIT_USER_ERROR)
    except WorkerFailed as error:
        errors.print(f"[red]failed:[/] {escape(str(error))}", highlight=False)
        sys.exit(EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("stopped; the same command goes on where it was")
        sys.exit(EXIT_STOPPED)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: a wrong option
            if message := error.format_message().rstrip("."):  # empty: `nst` alone, which has printed its help
                errors.print(f"[red]error:[/] {escape(message)}; see nst --help", highlight=False)
            sys.exit(EXIT_USER_ERROR)
        known = explained(error)
        if known is None:
            raise
        errors.print(f"[red]error:[/] {escape(str(known))}", highlight=False)
        sys.exit(EXIT_USER_ERROR)


def _exit_on_signal(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _run_plain(run: Run, display: Any) -> str:
    from flows.console import shown
    from flows.driver import execute
    from tasks.stage import StageOutcome, StageRequest, run_stage

    def do_stage(request: StageRequest) -> StageOutcome:
        return shown(request, display, lambda: run_stage(request, display.progress))

    return execute(run, do_stage).name


def _stage_plain(name: str, recipe: str, overrides: list[str], store: Store, scale: str) -> None:
    from flows.console import make_display, shown
    from flows.driver import execute_one
    from tasks.stage import run_stage

    display = make_display(console)
    run = resolve_run(load_experiment(recipe, overrides, scale), recipe, store, Rerun())
    execute_one(run, name, lambda r: shown(r, display, lambda: run_stage(r, display.progress)))


def _print_end_of_run(store_root: Store, name: str, store: str) -> None:
    """The table of a run that has ended, where its report lies, how to see this again. `store`: as the user wrote it."""
    _print_results(store_root, name, as_json=False)
    report = _node_manifest(store_root, name, "report")
    if report is not None:
        place = store_root.location(report.file("report.html").path)
        copy = "" if store_root.root else f"  (nst report {name} --store {store} saves a copy)"
        console.print(f"report: {place}{copy}", highlight=False, soft_wrap=True)
    console.print(f"again:  nst results {name} --store {store}", highlight=False)


def _print_results(store: Store, run_name: str, as_json: bool) -> None:
    record = read_run(store, run_name)
    manifests = {n.name: m for n in record.nodes if (m := find(store, n.kind, n.key)) is not None}
    records = result_records(record.experiment, manifests)
    if as_json:
        print(json.dumps(records, indent=1))
        return
    from flows.console import results_table

    if not records:
        console.print(
            f"{record.name}: no model is evaluated yet; `nst plan` with its recipe says what is left", highlight=False
        )
        return
    console.print(results_table(records, f"{record.name}: top-1 on the test set"))


def _node_manifest(store: Store, run_name: str, node: str) -> Any:
    record = read_run(store, run_name).node(node)
    return find(store, record.kind, record.key) if record else None


COMMANDS: dict[str, Callable[..., None]] = {  # in the order of `nst --help`: as people come to need them
    "demo": demo,
    "plan": plan,
    "run": run,
    "results": results,
    "report": store_commands.report,
    "explain": inspect_commands.explain,
    "sample": inspect_commands.sample,
    "diff": inspect_commands.diff,
    "lineage": lineage_command.lineage,
    "evaluate": evaluation_commands.evaluate,
    "compare": evaluation_commands.compare,
    "export": store_commands.export,
    "next": next_iteration,
    "stage": stage,
    "study": study_commands.study,
    "serve": serve.serve,
    "join": join_command.join,
    "automations": automations.automations,
    "ls": store_commands.ls,
    "show": store_commands.show,
    "verify": store_commands.verify,
    "gc": store_commands.gc,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"nst {version('noisy-student')}, code {code_state()['commit'] or 'unknown'}")
        raise typer.Exit


@app.callback()
def _top(
    shows_version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print version and commit.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
