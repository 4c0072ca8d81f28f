"""Each stage as a flow of its own: the same code as in the loop, for reruns and schedules of one stage."""

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from flows.driver import Rerun, execute_node, find_node, resolve_run
from flows.experiment import load_experiment
from flows.iteration import prefect_stage
from storage.objects import Store


@flow(name="noisy-student-stage", flow_run_name="{recipe} {stage}", persist_result=False)
def single_stage(
    stage: str = Field("prepare", title="Stage", description="prepare, report, or ITERATION/ROLE such as 2/select"),
    recipe: str = Field("digits", title="Recipe", description="A shipped recipe's name, or the path of your own"),
    overrides: list[str] = Field([], title="Overrides", description="One a line, e.g. student.epochs=30"),
    store: str = Field("nst-store", title="Store", description="Root URL of the artifacts: file:///... or a folder"),
    scale: str = Field("", title="Scale", description="A scale that the recipe offers, e.g. smoke; empty: in full"),
) -> str:
    """One stage of an experiment, its inputs being in the store. Returns the artifact's key."""
    run = resolve_run(load_experiment(recipe, overrides, scale), recipe, Store(store), Rerun(), str(flow_run.id or ""))
    run.store.check_writable()
    return execute_node(run, find_node(run, stage), prefect_stage(run)).manifest.key
