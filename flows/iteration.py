"""The experiment's loop as a Prefect flow: teacher, then label, select, student, evaluate for each iteration, report.

Run from code: `noisy_student(recipe="digits", overrides=[], store="nst-store")`, then one more iteration on top of what
it made: `next_iteration(experiment="digits", overrides=["student.epochs=300"], store="nst-store")`.

Parameters are what the run form in Prefect's UI shows, so they are strings, numbers, lists and choices only: the form
stores junk for dicts and for what may be null. An empty string stands for "not set".
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from pydantic import Field

from flows.automations import end_crash_loop
from flows.console import Display, PlainDisplay, shown
from flows.driver import Rerun, Run, execute, resolve_run
from flows.experiment import DEFAULT_STORE, load_experiment, shipped_recipes
from flows.next import next_run
from flows.ray_task_runs import offer_task_runs
from flows.ui_artifacts import RunPages
from models.process_tree import end_with_parent
from storage.objects import Store
from tasks.stage import DoStage, StageOutcome, StageRequest, stage_task

if TYPE_CHECKING:
    ShippedRecipe = str
else:
    ShippedRecipe = Literal[shipped_recipes()]  # a select in the form: a new recipe file is one more choice

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
    "evaluate-corrupted",
    "evaluate-perturbed",
    "evaluate-fgsm",
    "evaluate-pgd",
    "evaluate-subset",
    "evaluate-imagenet-c",
    "evaluate-imagenet-p",
    "report",
]


def form_field(default: Any, title: str, description: str) -> Any:
    """The default of a flow's parameter, and how the run form names it (Prefect replaces the title of a plain Field)."""
    return Field(default, description=description, json_schema_extra={"title": title})


RECIPE: str = form_field("digits", "Recipe", "A recipe that the project ships")
RECIPE_URL: str = form_field(
    "",
    "Own recipe",
    "Instead of a shipped one: a recipe file on the worker's machine, or its URL (s3://bucket/birds.yaml)",
)
OVERRIDES: list[str] = form_field(
    [], "Overrides", "Dotted settings, one an entry: student.epochs=30, iterations.2.batch_ratio=28"
)
SCALE: str = form_field("", "Scale", "A scale that the recipe offers, e.g. smoke; empty: in full")
STORE: str = form_field(
    "",
    "Store",
    f"Root of the artifacts: s3://bucket/prefix, file:///... or a folder; empty: the worker's NST_STORE, or {DEFAULT_STORE}",
)
_display: list[Display] = []


def show_on(display: Display) -> None:
    """Have the flows of this process report to a display instead of their run's log."""
    _display[:] = [display]


@flow(name="noisy-student", flow_run_name="{recipe}", persist_result=False)
def noisy_student(
    recipe: ShippedRecipe = RECIPE,
    recipe_url: str = RECIPE_URL,
    overrides: list[str] = OVERRIDES,
    scale: str = SCALE,
    store: str = STORE,
    rerun: RerunChoice = form_field("nothing", "Rerun", "Make this stage, and all that follows, anew"),
    rerun_iteration: Annotated[int, Field(ge=-1)] = form_field(
        -1, "Rerun iteration", "Only this iteration's; -1: of all"
    ),
) -> str:
    """A whole Noisy Student experiment; stages that are in the store are reused. Returns the name of the run's record."""
    choice = Rerun("" if rerun == "nothing" else rerun, None if rerun_iteration < 0 else rerun_iteration)
    run = resolve_flow(recipe, recipe_url, overrides, scale, store, choice)
    with prefect_stage(run) as do_stage:
        return execute(run, do_stage).name


@flow(name="noisy-student-next", flow_run_name="{experiment} next iteration", persist_result=False)
def next_iteration(
    experiment: str = form_field("digits", "Experiment", "The name of one with a finished run"),
    overrides: list[str] = form_field(
        [],
        "Overrides",
        "Of the new iteration, one an entry: student.batch_ratio=28; else it is trained like the latest",
    ),
    store: str = STORE,
) -> str:
    """One more iteration on top of an experiment's newest finished run, taught by its latest student.

    Former stages are reused. Returns the name of the run's record.
    """
    _begin()
    run = next_run(open_store(store), experiment, overrides, str(flow_run.id or ""))
    with prefect_stage(run) as do_stage:
        return execute(run, do_stage).name


def _begin() -> None:
    """What comes first in every flow run. Raises UserError where it has crashed too often."""
    end_with_parent()  # a worker of `nst serve`, without which nobody could cancel it
    end_crash_loop(flow_run)


def resolve_flow(
    recipe: str, recipe_url: str, overrides: list[str], scale: str, store: str, rerun: Rerun, role: str = ""
) -> Run:
    """What a flow was asked for, made concrete; a wrong setting ends here, before the store or any image is touched.

    A run of one's own recipe is called after its experiment (and role): Prefect knows the shipped recipe's name only.
    """
    _begin()
    chosen = recipe_url.strip() or recipe
    experiment = load_experiment(chosen, overrides, scale)
    identity = str(flow_run.id or "")
    if recipe_url.strip() and identity:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=f"{experiment.name} {role}".strip())
    return resolve_run(experiment, chosen, open_store(store), rerun, identity)


def open_store(store: str) -> Store:
    """The store that a flow was given; for an empty one what NST_STORE says where the flow runs, else a folder there."""
    return Store(store.strip() or os.environ.get("NST_STORE") or DEFAULT_STORE)


def recipe_parameters(recipe: str) -> dict[str, str]:
    """How a recipe, by its name or path, is given to a flow."""
    return {"recipe": recipe} if recipe in shipped_recipes() else {"recipe_url": recipe}


@contextmanager
def prefect_stage(run: Run) -> Iterator[DoStage]:
    """How a stage is carried out under Prefect: as a task, reporting to the display or the run's log, and to the UI."""
    display = _display[0] if _display else PlainDisplay(get_run_logger().info)
    stage = stage_task(run.experiment.compute.retries, display.note, offer_task_runs)
    on_log = (lambda line: None) if _display else get_run_logger().info

    def do_stage(request: StageRequest) -> StageOutcome:
        def work() -> StageOutcome:
            watch = pages.watch(request, display.progress)
            state = stage(request.record.name, request, watch, on_log, return_state=True)
            outcome: StageOutcome = state.result()  # raises the stage's own error
            pages.stage_done(request.record.name)
            return outcome

        return shown(request, display, work)

    with closing(RunPages(run)) as pages:
        yield do_stage
