"""Each stage as a flow of its own: the same code as in the loop, for reruns and schedules of one stage.

Run from code: `select(recipe="digits", iteration=1)`; on the command line: `nst stage 1/select digits`.
"""

from collections.abc import Callable
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.driver import Rerun, execute_one
from flows.iteration import (
    OVERRIDES,
    RECIPE,
    RECIPE_URL,
    SCALE,
    STORE,
    ShippedRecipe,
    form_field,
    prefect_stage,
    resolve_flow,
)

ITERATION: int = form_field(1, "Iteration", "Which one; the teacher's and the selecting model's is 0")


def _make_stage_flow(role: str, what: str) -> Callable[..., str]:
    """The flow of one stage. Its inputs must be in the store; it returns the artifact's key."""

    def run_stage_flow(
        recipe: ShippedRecipe = RECIPE,
        recipe_url: str = RECIPE_URL,
        iteration: Annotated[int, Field(ge=0)] = ITERATION,
        overrides: list[str] = OVERRIDES,
        scale: str = SCALE,
        store: str = STORE,
    ) -> str:
        name = role if role in ("prepare", "unlabeled", "report") else f"{iteration}/{role}"
        run = resolve_flow(recipe, recipe_url, overrides, scale, store, Rerun(), role)
        with prefect_stage(run) as do_stage:
            return execute_one(run, name, do_stage).manifest.key

    run_stage_flow.__name__ = role.replace("-", "_")
    run_stage_flow.__doc__ = what
    made: Callable[..., str] = flow(
        name=f"noisy-student-{role}", flow_run_name="{recipe} " + role, description=what, persist_result=False
    )(run_stage_flow)
    return made


prepare = _make_stage_flow("prepare", "Labeled, validation and test images become shards with an index.")
unlabeled = _make_stage_flow(
    "unlabeled", "Unlabeled images become shards, without those that leaked from the evaluation."
)
teacher = _make_stage_flow("teacher", "Train the teacher on the labeled images (iteration 0).")
selector = _make_stage_flow("selector", "Train the selecting model (iteration 0, order=once).")
label = _make_stage_flow("label", "A model labels the unlabeled images.")
select = _make_stage_flow("select", "Filter by confidence, balance the classes, write shards.")
student = _make_stage_flow("student", "Train a student on labeled and pseudo-labeled images.")
finetune = _make_stage_flow("finetune", "Train a network again on the labeled images, e.g. at a higher resolution.")
evaluate = _make_stage_flow("evaluate", "Measure a model on validation and test images.")
evaluate_corrupted = _make_stage_flow("evaluate-corrupted", "Measure a model under corruptions, made on the fly.")
evaluate_perturbed = _make_stage_flow(
    "evaluate-perturbed", "Measure a model on slowly changing images, made on the fly."
)
evaluate_fgsm = _make_stage_flow("evaluate-fgsm", "Measure a model under FGSM, one signed gradient step.")
evaluate_pgd = _make_stage_flow("evaluate-pgd", "Measure a model under PGD, several signed gradient steps.")
evaluate_subset = _make_stage_flow("evaluate-subset", "Measure a model on images of some classes, such as ImageNet-A.")
evaluate_imagenet_c = _make_stage_flow(
    "evaluate-imagenet-c", "Measure a model on the published corrupted images of ImageNet-C."
)
evaluate_imagenet_p = _make_stage_flow(
    "evaluate-imagenet-p", "Measure a model on the published sequences of ImageNet-P."
)
report = _make_stage_flow("report", "One HTML page on the whole run.")
STAGE_FLOWS = {
    "prepare": prepare,
    "unlabeled": unlabeled,
    "teacher": teacher,
    "selector": selector,
    "label": label,
    "select": select,
    "student": student,
    "finetune": finetune,
    "evaluate": evaluate,
    "evaluate-corrupted": evaluate_corrupted,
    "evaluate-perturbed": evaluate_perturbed,
    "evaluate-fgsm": evaluate_fgsm,
    "evaluate-pgd": evaluate_pgd,
    "evaluate-subset": evaluate_subset,
    "evaluate-imagenet-c": evaluate_imagenet_c,
    "evaluate-imagenet-p": evaluate_imagenet_p,
    "report": report,
}
