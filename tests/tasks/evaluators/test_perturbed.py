"""ImageNet-P's measures on sequences made on the fly."""

import numpy as np
import pytest
import torch

from models import zoo
from storage.shards import read_tables
from tasks.evaluators.altered import first_classes, ranked_classes
from tasks.metrics.perturbation import flip_probability, top5_distance
from tests.models.artifacts import CLASSES, commit_model
from tests.tasks.evaluators.conftest import Subject
from tests.tasks.evaluators.evaluations import evaluate
from tests.tasks.labeling import NETWORK


def test_flips_are_those_of_the_kept_predictions(tested: Subject) -> None:
    made = evaluate(tested.store, "perturbed", tested.inputs, kinds=["rotate", "gaussian_noise"])
    for table, kind in zip(read_tables(tested.store, made.files), ("rotate", "gaussian_noise"), strict=True):
        ranked = ranked_classes(table).reshape(8, 31, 4)
        assert table["frame"].to_pylist() == list(range(31)) * 8
        noise = kind == "gaussian_noise"
        assert made.metrics["flips"][kind] == pytest.approx(flip_probability(ranked[..., 0], noise))
        assert made.metrics["top5_distances"][kind] == pytest.approx(top5_distance(ranked, noise))
    assert made.metrics["images"] == 16


def test_a_constant_classifier_never_flips(tested: Subject) -> None:
    torch.manual_seed(0)
    model = zoo.build(NETWORK, len(CLASSES))
    with torch.no_grad():
        model.get_classifier().weight.zero_()
        model.get_classifier().bias.copy_(torch.tensor([0.0, 3.0, 1.0, 2.0]))
    constant = commit_model(tested.store, model, NETWORK, "constant")
    made = evaluate(tested.store, "perturbed", {**tested.inputs, "model": constant}, kinds=["tilt", "shot_noise"])
    assert made.metrics["flips"] == {"tilt": 0, "shot_noise": 0}
    assert made.metrics["mean_top5_distance"] == 0
    assert {int(c) for t in read_tables(tested.store, made.files) for c in np.unique(first_classes(t))} == {1}
