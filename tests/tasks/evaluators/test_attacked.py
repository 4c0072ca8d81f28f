"""FGSM and PGD as evaluations."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.attacks import PixelNetwork, fgsm
from models.classifier import load_model
from models.decode import clean_pixels, decode_pixels
from models.loader import IndexedImages
from storage.shards import read_table
from tasks.evaluators import headline_of
from tests.tasks.evaluators.conftest import Subject
from tests.tasks.evaluators.evaluations import CountingEngine, evaluate


def test_accuracies_are_those_of_the_attacked_network(tested: Subject) -> None:
    made = evaluate(tested.store, "fgsm", tested.inputs, split="val", epsilons=[0, 2, 8])
    model = load_model(tested.store, tested.model)
    network = PixelNetwork(model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    images = IndexedImages(tested.store, tested.data, "val")
    encoded = [next(images.bytes_in_order([row])) for row in range(len(images))]
    clean = torch.stack([clean_pixels(decode_pixels(data), 24, 0.875) for data in encoded])
    pixels, labels = clean.permute(0, 3, 1, 2) / 255, torch.tensor(images.labels.tolist())
    moved = [pixels, *fgsm(network, pixels, labels, [2 / 255, 8 / 255])]
    expected = [float((network(own).argmax(dim=1) == labels).float().mean()) for own in moved]
    assert list(made.metrics["accuracy"].values()) == pytest.approx(expected, abs=1e-6)
    assert list(made.metrics["accuracy"]) == ["0", "2", "8"]


def test_epsilon_zero_is_the_clean_accuracy_and_pgd_does_no_less_harm_than_fgsm(tested: Subject) -> None:
    clean = evaluate(tested.store, "clean", tested.inputs).metrics["val"]["top1"]
    single, many = (
        evaluate(tested.store, short, tested.inputs, split="val", epsilons=[0, 4]).metrics["accuracy"]
        for short in ("fgsm", "pgd")
    )
    assert single["0"] == many["0"] == pytest.approx(clean)
    assert many["4"] <= single["4"] <= clean


def test_all_epsilons_of_a_shard_are_made_from_one_pass(tested: Subject) -> None:
    engine = CountingEngine()
    made = evaluate(tested.store, "fgsm", tested.inputs, engine, epsilons=[1, 3])
    assert [len(job["parts"]) for job in engine.jobs] == [2]
    first = read_table(tested.store, made.file("predictions/1/00000.parquet"))
    assert len(first) == made.metrics["images"] == 8
    assert np.isfinite(first["confidence"].to_numpy()).all()


def test_the_number_for_tables_names_its_epsilon(tested: Subject) -> None:
    made = evaluate(tested.store, "pgd", tested.inputs, epsilons=[0, 8])
    found = headline_of(made)
    assert found is not None
    assert (found.title, found.value) == ("PGD 8/255", made.metrics["accuracy"]["8"])


@pytest.mark.parametrize("epsilons", [[2, 1], [-1, 1], [1, 1], []])
def test_epsilons_rise(tested: Subject, epsilons: list[float]) -> None:
    with pytest.raises(ValidationError):
        evaluate(tested.store, "fgsm", tested.inputs, epsilons=epsilons)
