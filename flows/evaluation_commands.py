"""The commands that measure models: `evaluate` one, `compare` several."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.terminal import JsonOption, StoreOption, check_target, console
from storage.artifacts import get
from storage.errors import UserError
from storage.objects import Store


def evaluate(
    evaluator: Annotated[
        str, typer.Argument(help="clean, corrupted, fgsm, pgd; subset (ImageNet-A), imagenet-c, imagenet-p.")
    ],
    model: Annotated[
        str,
        typer.Argument(help="A model's ref, such as digits/2/student, or a timm name, hf-hub: or local-dir: weights."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the evaluator's settings, e.g. severities=[3]; compute.device=cpu.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="A data set's ref, or a folder or file of labeled images; an archive's folder.")
    ] = "",
    store: StoreOption = "nst-store",
    as_json: JsonOption = False,
) -> None:
    """Measure a model with one evaluator; what was measured before is reused.

    Example: nst evaluate corrupted digits/2/student severities=[1,5] --store demo-store
    """
    from flows import evaluation
    from flows.console import make_display, shown
    from flows.evaluation_tables import evaluation_table
    from tasks.stage import StageOutcome, StageRequest, run_stage

    chosen, opened = evaluation.find_evaluator(evaluator), Store(store)
    display = make_display(console)

    def do_stage(request: StageRequest) -> StageOutcome:
        if as_json:
            return run_stage(request)
        return shown(request, display, lambda: run_stage(request, display.progress))

    made = evaluation.evaluate(opened, chosen, model, data, overrides or [], do_stage)
    if as_json:
        print(
            json.dumps({"key": made.key, "stage": made.stage, "inputs": made.inputs, "metrics": made.metrics}, indent=1)
        )
        return
    console.print(evaluation_table(made), highlight=False)


def compare(
    models: Annotated[list[str], typer.Argument(help="Two or more models: refs, or timm names that were evaluated.")],
    baseline: Annotated[
        str, typer.Option(help="The model whose errors and flips the others' are divided by; left out: the first.")
    ] = "",
    picture: Annotated[Path | None, typer.Option(help="Write one PNG of all panels to this file.")] = None,
    changed: Annotated[
        Path | None, typer.Option(help="Write the images that the last model has right and the first wrong, as a PNG.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=200, help="Of each kind in --changed.")] = 24,
    store: StoreOption = "nst-store",
    as_json: JsonOption = False,
) -> None:
    """Lay models beside each other: every evaluation that they have in common, intervals, who is significantly better.

    Example: nst compare digits/0/teacher digits/2/student --picture models.png --changed changed.png
    """
    from flows.evaluation import model_of
    from flows.evaluation_tables import comparison_tables
    from tasks.comparison.compare import changed_images
    from tasks.comparison.compare import compare as compare_models
    from tasks.comparison.picture import changed_sheet, comparison_picture

    if len(set(models)) < 2:
        raise UserError("compare at least two different models, e.g. nst compare digits/0/teacher digits/1/student")
    if baseline and baseline not in models:
        raise UserError(f"--baseline {baseline} is none of the models; name it among them too")
    for target in (picture, changed):
        if target is not None:
            check_target(target)
    opened = Store(store)
    groups = compare_models(opened, {name: model_of(opened, name) for name in models}, baseline)
    if picture is not None:
        picture.write_bytes(comparison_picture(groups, models))
    if changed is not None:
        found = changed_images(opened, groups, models[0], models[-1], images)
        clean = next(group for group in groups if group.evaluator == "clean")
        data = get(opened, "dataset", clean.manifests[models[0]].inputs["data"])
        changed_sheet(opened, data, found, models[0], models[-1]).save(changed, "PNG")
    if as_json:
        print(json.dumps([comparison_json(group) for group in groups], indent=1))
        return
    for table in comparison_tables(groups, models):
        console.print(table, highlight=False)
    for what, file in (("picture", picture), ("changed images", changed)):
        if file is not None:
            console.print(f"{what}: {file.absolute()}", highlight=False, soft_wrap=True)


def comparison_json(group: Any) -> dict[str, Any]:
    """A group without its manifests: which evaluations, their numbers, the tests of pairs."""
    evaluations = {name: manifest.key for name, manifest in group.manifests.items()}
    return {
        "evaluator": group.evaluator,
        "of": group.of,
        "evaluations": evaluations,
        "measures": [asdict(measure) for measure in group.measures],
        "pairs": [asdict(pair) for pair in group.pairs],
    }
