"""The experiment's loop as a Prefect flow: teacher, then label, select, student, evaluate for each iteration, report.

Run from code: `noisy_student(recipe="digits", overrides=[], store="nst-store", rerun="nothing")`.
"""

from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flows.console import Display, PlainDisplay, shown
from flows.driver import Rerun, Run, execute, resolve_run
from flows.experiment import load_experiment
from flows.ui_artifacts import RunPages
from storage.objects import Store
from tasks.stage import StageOutcome, StageRequest, stage_task

RerunChoice = Literal[
    "nothing",
    "prepare",
    "unlabeled",
    "teacher",
    "selector",
    "label",
    "select",
    "student",
    "finetune",
    "evaluate",
    "report",
]
RECIPE = Field("digits", title="Recipe", description="A shipped recipe's name, or the path of your own")
OVERRIDES: list[str] = Field([], title="Overrides", description="One a line, e.g. student.epochs=30")
STORE = Field(
    "nst-store", title="Store", description="Root URL of the artifacts: s3://bucket/prefix, file:///... or a folder"
)
SCALE = Field("", title="Scale", description="A scale that the recipe offers, e.g. smoke; empty: in full")
_display: list[Display] = []


def show_on(display: Display) -> None:
    """Have the flows of this process report to a display instead of their run's log."""
    _display[:] = [display]


@flow(name="noisy-student", flow_run_name="{recipe}", persist_result=False)
def noisy_student(
    recipe: str = RECIPE,
    overrides: list[str] = OVERRIDES,
    store: str = STORE,
    rerun: RerunChoice = Field("nothing", title="Rerun", description="Make this stage, and all that follows, anew"),
    rerun_iteration: int = Field(-1, title="Rerun iteration", description="Only this iteration's; -1: of all", ge=-1),
    scale: str = SCALE,
) -> str:
    """A whole Noisy Student experiment; stages that are in the store are reused. Returns the name of the run's record."""
    experiment = load_experiment(recipe, overrides, scale)
    choice = Rerun("" if rerun == "nothing" else rerun, None if rerun_iteration < 0 else rerun_iteration)
    run = resolve_run(experiment, recipe, Store(store), choice, str(flow_run.id or ""))
    return execute(run, prefect_stage(run)).name


def prefect_stage(run: Run) -> Any:
    """How a stage is carried out under Prefect: as a task, reporting to the display or the run's log, and to the UI."""
    stage, pages = stage_task(), RunPages(run)
    display = _display[0] if _display else PlainDisplay(get_run_logger().info)
    on_log = (lambda line: None) if _display else get_run_logger().info

    def do_stage(request: StageRequest) -> StageOutcome:
        def work() -> StageOutcome:
            watch = pages.watch(request, display.progress)
            state = stage(request.record.name, request, watch, on_log, return_state=True)
            outcome: StageOutcome = state.result()  # raises the stage's own error
            pages.stage_done(request.record.name)
            return outcome

        return shown(request, display, work)

    return do_stage
