"""The corrupted evaluation: right numbers, resumed by kind, and refused where its input does not fit."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.classifier import Classifier
from models.corruptions.apply import corrupt, noise_of
from models.decode import clean_pixels, decode_pixels
from models.loader import IndexedImages
from models.numerics import chosen_numerics
from storage.errors import UserError
from storage.shards import read_tables
from tasks.evaluators.altered import first_classes
from tests.models.artifacts import COMPUTE
from tests.tasks.evaluators.conftest import Subject
from tests.tasks.evaluators.evaluations import CountingEngine, evaluate


def test_errors_are_those_of_the_network_on_images_corrupted_here(tested: Subject) -> None:
    made = evaluate(
        tested.store, "corrupted", tested.inputs, split="val", kinds=["snow", "contrast"], severities=[2, 5]
    )
    network = Classifier(tested.store, tested.model, chosen_numerics(COMPUTE), "cpu")
    images = IndexedImages(tested.store, tested.data, "val")
    errors = {}
    for kind in ("snow", "contrast"):
        for severity in (2, 5):
            pixels = []
            for row in range(len(images)):
                (data,) = images.bytes_in_order([row])
                clean = clean_pixels(decode_pixels(data), network.image_size, network.crop_pct).numpy()
                rng = noise_of(0, kind, severity, images.index["key"][row].as_py())
                pixels.append(torch.from_numpy(corrupt(clean, kind, severity, rng, "cifar")))
            guessed = network.logits(torch.stack(pixels)).argmax(dim=1).numpy()
            errors[kind, severity] = (guessed != images.labels).mean()
    measured = {(k, int(s)): error for k, own in made.metrics["errors"].items() for s, error in own.items()}
    assert measured == pytest.approx(errors)
    assert made.metrics["mean_error"] == pytest.approx(np.mean(list(errors.values())))
    assert made.metrics["top1"] == pytest.approx(1 - made.metrics["mean_error"])
    assert (made.metrics["levels"], made.metrics["images"]) == ("cifar", 24)


def test_a_broken_off_evaluation_goes_on_with_the_next_kind(tested: Subject) -> None:
    kinds: dict[str, Any] = {"kinds": ["fog", "pixelate", "brightness"], "severities": [1, 3]}
    with pytest.raises(KeyboardInterrupt):
        evaluate(tested.store, "corrupted", tested.inputs, CountingEngine(most_jobs=2), **kinds)
    rest = CountingEngine()
    evaluate(tested.store, "corrupted", tested.inputs, rest, **kinds)
    assert [job["name"].split()[0] for job in rest.jobs] == ["brightness"]


def test_one_more_severity_makes_only_its_own_images(tested: Subject) -> None:
    first = evaluate(tested.store, "corrupted", tested.inputs, kinds=["frost"], severities=[4])
    engine = CountingEngine()
    more = evaluate(tested.store, "corrupted", tested.inputs, engine, kinds=["frost"], severities=[4, 5])
    assert [[variant["severity"] for _, variant in job["parts"]] for job in engine.jobs] == [[5]]
    assert more.metrics["errors"]["frost"]["4"] == first.metrics["errors"]["frost"]["4"]


def test_batches_do_not_decide_what_is_predicted(tested: Subject) -> None:
    settings: dict[str, Any] = {"kinds": ["gaussian_noise"], "severities": [5], "split": "val"}
    found = []
    for batch in (16, 5):
        compute = COMPUTE.model_copy(update={"inference_batch": batch})
        made = evaluate(tested.store, "corrupted", tested.inputs, compute=compute, **settings, seed=7)
        found.append(first_classes(read_tables(tested.store, made.files)[0]).tolist())
    assert found[0] == found[1]


def test_a_model_takes_data_whose_classes_are_some_of_its_own_by_name(tested: Subject) -> None:
    names = list(reversed(tested.model.metrics["class_names"]))
    turned = tested.data.model_copy(update={"metrics": {**tested.data.metrics, "class_names": names}})
    settings: dict[str, Any] = {"kinds": ["contrast"], "severities": [1]}
    made = evaluate(tested.store, "corrupted", {**tested.inputs, "data": turned}, **settings)
    labels = read_tables(tested.store, made.files)[0]["label"].to_numpy()
    plain = evaluate(tested.store, "corrupted", tested.inputs, **settings, seed=1)  # contrast draws nothing
    assert labels.tolist() == (3 - read_tables(tested.store, plain.files)[0]["label"].to_numpy()).tolist()


def test_a_data_set_with_a_class_that_the_model_does_not_know_is_refused(tested: Subject) -> None:
    names = [*tested.model.metrics["class_names"][:3], "yak"]
    other = tested.data.model_copy(update={"metrics": {**tested.data.metrics, "class_names": names}})
    with pytest.raises(
        UserError, match=r"does not know, 1 of 4 \(the first: 'yak'.*choose data of the model's 4 classes"
    ):
        evaluate(tested.store, "corrupted", {**tested.inputs, "data": other})


def test_a_split_that_is_not_there_is_refused(tested: Subject) -> None:
    without = tuple(entry for entry in tested.data.files if "/test/" not in entry.name)
    data = tested.data.model_copy(update={"files": without})
    with pytest.raises(UserError, match="has no test images, it has .*set split to one of these"):
        evaluate(tested.store, "corrupted", {**tested.inputs, "data": data})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"kinds": ["fogg"]}, "unknown corruptions fogg; choose from gaussian_noise"),
        ({"severities": [0, 1]}, "severities are 1 to 5"),
        ({"severities": [2, 2]}, "stands twice"),
        ({"kinds": []}, "at least 1 item"),
    ],
)
def test_wrong_settings_are_refused(tested: Subject, config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        evaluate(tested.store, "corrupted", tested.inputs, **config)
