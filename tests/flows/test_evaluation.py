"""`nst evaluate` and `nst compare`: on a model of the store, on weights from outside, on a folder; and on wrong input."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from flows.cli import app
from flows.console import results_table
from flows.evaluation import model_of
from flows.ui_pages import RunView, results_page, stage_page
from models import zoo
from models.configs import ModelConfig
from storage.artifacts import get
from storage.errors import UserError
from storage.objects import Store
from storage.runs import resolve_ref, set_ref
from tasks.results import result_records
from tests.models.artifacts import CLASSES, make_artifacts
from tests.tasks.evaluators.small_archives import digit, write, write_imagenet_c
from tests.tasks.labeling import teacher

FOLDER_NETWORK = ModelConfig(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, image_size=32)


class Place:
    """A store with two models under refs, weights in a folder, and labeled images in class folders."""

    def __init__(self, folder: Path) -> None:
        artifacts = make_artifacts(folder)
        self.store, self.data = artifacts.store, artifacts.data
        set_ref(self.store, "digits/prepare", "dataset", self.data.key)
        for name, seed in (("digits/0/teacher", 3), ("digits/1/student", 4)):
            model = teacher(self.store, seed)
            set_ref(self.store, name, "model", model.key)
        self.weights = folder / "weights"
        self.weights.mkdir()
        torch.manual_seed(0)
        zoo.save(zoo.build(FOLDER_NETWORK, len(CLASSES)), FOLDER_NETWORK, list(CLASSES), self.weights)
        self.images = folder / "own"
        for label, name in enumerate(CLASSES):
            for number in range(4):
                write(self.images / name / f"{number}.jpg", digit(number, label, 40))
        self.archive = write_imagenet_c(folder / "imagenet-c", {"fog": "weather"})

    def run(self, *arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, "--store", self.store.url])
        if done.exception is not None:
            raise done.exception
        return done.stdout

    def evaluate(self, *arguments: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.run("evaluate", *arguments, "--json"))
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("evaluation"))


FEW = ("kinds=[contrast]", "severities=[1]")


def test_a_model_of_the_store_is_measured_once(place: Place) -> None:
    arguments = ("corrupted", "digits/1/student", *FEW, "--data", "digits/prepare")
    first, again = place.evaluate(*arguments), place.evaluate(*arguments)
    assert first == again
    assert resolve_ref(place.store, f"evaluations/corrupted/{str(first['key'])[:12]}").key == first["key"]
    assert "contrast" in place.run("evaluate", *arguments)


def test_weights_from_outside_are_measured_on_a_folder_of_ones_own(place: Place) -> None:
    model = f"local-dir:{place.weights}"
    made = place.evaluate("clean", model, "--data", str(place.images))
    assert made["metrics"]["test"]["images"] == 16  # type: ignore[index]
    table = place.run("evaluate", "clean", model, "--data", str(place.images))
    assert "top-1" in table
    other = place.evaluate("fgsm", model, "epsilons=[0,2]", "--data", str(place.images))
    assert other["inputs"] == made["inputs"], "imported and ingested once"


def test_an_archives_folder_is_its_data(place: Place) -> None:
    made = place.evaluate("imagenet-c", "digits/0/teacher", "kinds=[fog]", "--data", str(place.archive))
    assert made["metrics"]["images"] == 40  # type: ignore[index]
    assert "CE" in place.run("evaluate", "imagenet-c", "digits/0/teacher", "kinds=[fog]", f"root={place.archive}")


def test_two_models_are_compared_in_one_table_and_one_picture(place: Place, tmp_path: Path) -> None:
    models = ("digits/0/teacher", "digits/1/student")
    for model in models:
        place.evaluate("clean", model, "--data", "digits/prepare")
        place.evaluate("corrupted", model, *FEW, "--data", "digits/prepare")
    files = (tmp_path / "models.png", tmp_path / "changed.png")
    told = place.run("compare", *models, "--picture", str(files[0]), "--changed", str(files[1]))
    assert "McNemar p" in told
    assert "top-1" in told
    assert all(file.stat().st_size > 1000 for file in files)
    groups = json.loads(place.run("compare", *models, "--json"))
    assert [group["evaluator"] for group in groups] == ["clean", "corrupted"]
    assert set(groups[0]["evaluations"]) == set(models)


def test_each_evaluation_has_a_page_and_a_number_in_the_table_of_a_run(place: Place) -> None:
    model = model_of(place.store, "digits/1/student")
    made = {"1/student": model.model_copy(update={"metrics": {**model.metrics, "val_top1": 0.5, "num_parameters": 7}})}
    asked = {
        "evaluate": ("clean", "--data", "digits/prepare"),
        "evaluate-corrupted": ("corrupted", *FEW, "--data", "digits/prepare"),
        "evaluate-fgsm": ("fgsm", "epsilons=[0,4]", "--data", "digits/prepare"),
        "evaluate-perturbed": ("perturbed", "kinds=[tilt]", "--data", "digits/prepare"),
        "evaluate-imagenet-c": ("imagenet-c", "kinds=[fog]", "--data", str(place.archive)),
    }
    for stage, (short, *rest) in asked.items():
        found = place.evaluate(short, "digits/1/student", *rest)
        made[f"1/{stage}"] = get(place.store, "evaluation", str(found["key"]))
    (record,) = result_records("digits", made)
    metrics = {stage: made[f"1/{stage}"].metrics for stage in asked}
    assert record["top1"] == metrics["evaluate"]["test"]["top1"]
    assert record["others"] == {
        "corrupted": metrics["evaluate-corrupted"]["top1"],
        "FGSM 4/255": metrics["evaluate-fgsm"]["accuracy"]["4"],
        "unflipped": pytest.approx(1 - metrics["evaluate-perturbed"]["mean_flip"]),
        "ImageNet-C": metrics["evaluate-imagenet-c"]["top1"],
    }
    table = Console(record=True, width=200, file=io.StringIO())
    table.print(results_table([record], ""))
    text = table.export_text()
    assert all(title in text for title in record["others"])
    view = RunView("digits", place.store, made, lambda name: f"/{name}")
    for stage, word in (("evaluate-corrupted", "contrast"), ("evaluate-fgsm", "1/255"), ("evaluate-perturbed", "tilt")):
        page = stage_page(view, f"1/{stage}")
        assert word in page
        assert f"{made[f'1/{stage}'].key}" in page
    assert "data:image/png" in stage_page(view, "1/evaluate"), "the reliability diagram"
    assert all(f"{title}, %" in results_page(view) for title in record["others"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("evaluate", "cleam", "digits/0/teacher"), "there is no evaluator 'cleam'; there are clean, corrupted"),
        (("evaluate", "clean", "digits/9/student"), "no ref 'digits/9/student'"),
        (("evaluate", "clean", "digits/prepare"), "digits/prepare is no model but a dataset"),
        (
            ("evaluate", "clean", "digits/0/teacher"),
            "was not trained on a data set of this store; give one with --data",
        ),
        (("evaluate", "corrupted", "digits/0/teacher", "severitys=[1]"), "did you mean severities"),
        (("evaluate", "corrupted", "digits/0/teacher", "severities=[6]"), "severities are 1 to 5"),
        (("evaluate", "clean", "digits/0/teacher", "--data", "digits/1/student"), "is no data set but of kind model"),
        (("evaluate", "clean", "local-dir:/nowhere"), "has no model.safetensors"),
        (("evaluate", "subset", "digits/0/teacher"), "root is not set; set root=FOLDER"),
        (("compare", "digits/0/teacher"), "compare at least two"),
        (("compare", "digits/0/teacher", "digits/1/student", "--baseline", "x"), "is none of the models"),
    ],
)
def test_wrong_input_is_told_with_the_remedy(place: Place, arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        place.run(*arguments)


def test_a_folder_with_other_classes_than_the_models_is_refused(place: Place, tmp_path: Path) -> None:
    for name in ("one", "yak"):
        write(tmp_path / "odd" / name / "1.jpg", digit(0, 1))
    with pytest.raises(UserError, match="the first: 'yak'"):
        place.run("evaluate", "clean", "digits/0/teacher", "--data", str(tmp_path / "odd"))


def test_a_store_remembers_imported_weights(place: Place) -> None:
    model = f"local-dir:{place.weights}"
    place.evaluate("clean", model, "--data", str(place.images))
    assert Store(place.store.url).paths("refs/imported")
