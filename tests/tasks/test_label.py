"""What a teacher's predictions may become: soft, hard, tempered, cut to k classes, averaged, or noised."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.classifier import Classifier, NoisedClassifier
from models.compute import ComputeConfig
from models.configs import LabelConfig, ViewConfig
from models.decode import clean_pixels, decode_pixels
from models.inference import label_shards
from models.loader import IndexedImages
from models.numerics import labeling_choices, labeling_seconds
from storage.artifacts import Manifest
from storage.errors import StoreError, UserError
from tests.models.artifacts import CLASSES, Artifacts, make_artifacts
from tests.tasks.labeling import PLAIN, Labeled, teacher


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return make_artifacts(tmp_path_factory.mktemp("label"))


@pytest.fixture(scope="module")
def teachers(artifacts: Artifacts) -> list[Manifest]:
    return [teacher(artifacts.store, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def plain(artifacts: Artifacts, teachers: list[Manifest]) -> Labeled:
    return Labeled(artifacts, teachers[:1])


def by_hand(artifacts: Artifacts, model: Manifest, crop_pct: float, flip: bool = False) -> np.ndarray:
    """Logits of one view of every unlabeled image, one at a time."""
    numerics = {"device": "cpu", "dtype": "float32", "layout": "channels_last", "compile": False, "batch": 1}
    network = Classifier(artifacts.store, model, numerics, "cpu")
    images = IndexedImages(artifacts.store, artifacts.data, "unlabeled")
    found = []
    for start in range(0, len(images), 24):
        for data in images.bytes_in_order(range(start, start + 24)):
            view = clean_pixels(decode_pixels(data), 24, crop_pct)
            found.append(network.logits((view.flip(1) if flip else view)[None])[0])
    return torch.stack(found).numpy()


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    raised = np.exp(logits.astype(np.float64) / temperature)
    return raised / raised.sum(axis=1, keepdims=True)


def same_decision(found: Labeled, expected: Labeled) -> bool:
    return bool((found.label == expected.label).all() and (found.confidence == expected.confidence).all())


def test_batches_predict_what_images_alone_do(artifacts: Artifacts, teachers: list[Manifest], plain: Labeled) -> None:
    expected = softmax(by_hand(artifacts, teachers[0], 0.875))
    assert plain.probabilities == pytest.approx(expected, abs=1e-3)
    assert plain.confidence == pytest.approx(expected.max(axis=1), abs=1e-5)
    assert len(set(plain.label)) > 1


def test_hard_targets_are_one_at_the_class(artifacts: Artifacts, teachers: list[Manifest], plain: Labeled) -> None:
    found = Labeled(artifacts, teachers[:1], targets="hard")
    assert same_decision(found, plain)
    assert np.array_equal(found.probabilities, np.eye(len(CLASSES))[plain.label])


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_shapes_the_targets_only(
    artifacts: Artifacts, teachers: list[Manifest], plain: Labeled, temperature: float
) -> None:
    found = Labeled(artifacts, teachers[:1], temperature=temperature)
    assert same_decision(found, plain)
    expected = softmax(by_hand(artifacts, teachers[0], 0.875), temperature)
    assert found.probabilities == pytest.approx(expected, abs=1e-3)
    assert not np.allclose(found.probabilities, plain.probabilities, atol=1e-2)


def test_top_k_keeps_the_likeliest(artifacts: Artifacts, teachers: list[Manifest], plain: Labeled) -> None:
    found = Labeled(artifacts, teachers[:1], top_k=2)
    assert same_decision(found, plain)
    order = np.argsort(-plain.probabilities, axis=1, kind="stable")[:, :2]
    kept, before = (np.take_along_axis(values.probabilities, order, 1) for values in (found, plain))
    assert kept == pytest.approx(before, abs=1e-3)
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(72), abs=2e-3)


def test_views_are_averaged(artifacts: Artifacts, teachers: list[Manifest]) -> None:
    views = (ViewConfig(), ViewConfig(flip=True), ViewConfig(crop_pct=0.7))
    found = Labeled(artifacts, teachers[:1], views=views)
    each = [by_hand(artifacts, teachers[0], crop, flip) for crop, flip in ((0.875, False), (0.875, True), (0.7, False))]
    expected = np.mean([softmax(logits) for logits in each], axis=0)
    assert found.probabilities == pytest.approx(expected, abs=1e-3)
    assert found.confidence == pytest.approx(expected.max(axis=1), abs=1e-5)


def test_several_teachers_are_averaged(artifacts: Artifacts, teachers: list[Manifest], plain: Labeled) -> None:
    found = Labeled(artifacts, teachers)
    expected = np.mean([softmax(by_hand(artifacts, model, 0.875)) for model in teachers], axis=0)
    assert found.probabilities == pytest.approx(expected, abs=1e-3)
    assert found.confidence == pytest.approx(expected.max(axis=1), abs=1e-5)
    assert not np.allclose(found.probabilities, plain.probabilities, atol=1e-2)


def test_a_noised_teacher_decides_like_the_clean_one(
    artifacts: Artifacts, teachers: list[Manifest], plain: Labeled
) -> None:
    found = Labeled(artifacts, teachers[:1], noised=True)
    assert same_decision(found, plain)
    assert (np.abs(found.probabilities - plain.probabilities).max(axis=1) > 0.01).mean() > 0.5
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(72), abs=2e-3)
    other = Labeled(artifacts, teachers[:1], noised=True, seed=1)
    assert not np.allclose(other.probabilities, found.probabilities, atol=1e-2)


def test_an_infinite_output_of_a_noised_teacher_is_an_error(
    artifacts: Artifacts, teachers: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NoisedClassifier, "logits", lambda *_: torch.tensor([[0.0, 1.0, -torch.inf, 0.0]]))
    with pytest.raises(StoreError, match="not finite"):
        Labeled(artifacts, teachers[:1], noised=True, seed=2)


def test_an_images_noise_does_not_hang_on_its_batch(artifacts: Artifacts, teachers: list[Manifest]) -> None:
    in_small, in_large = (
        Labeled(artifacts, teachers[:1], {**PLAIN, "inference_batch": batch}, noised=True) for batch in (5, 24)
    )
    assert np.array_equal(in_small.probabilities, in_large.probabilities)


@pytest.mark.parametrize("compile_", ["never", "always"])
def test_bfloat16_agrees_within_three_hundredths(
    artifacts: Artifacts, teachers: list[Manifest], plain: Labeled, compile_: str
) -> None:
    found = Labeled(artifacts, teachers[:1], {**PLAIN, "dtype": "bfloat16", "compile": compile_})
    assert found.result.facts["numerics"]["compile"] is (compile_ == "always")
    assert np.abs(found.confidence - plain.confidence).max() < 0.03
    assert (found.label == plain.label).mean() > 0.95


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": "hard", "top_k": 5}, "hard targets are one class"),
        ({"targets": "hard", "temperature": 2.0}, "hard targets are one class"),
        ({"noised": True, "views": [{}, {"flip": True}]}, "sees one noised view"),
        ({"seed": 3}, "seeds the noise"),
        ({"views": [{}, {}]}, "stands twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LabelConfig.model_validate(config)


def test_more_top_classes_than_there_are_is_refused_before_anything_runs(
    artifacts: Artifacts, teachers: list[Manifest]
) -> None:
    with pytest.raises(UserError, match=r"label.top_k=5 is more than the 4 classes"):
        Labeled(artifacts, teachers[:1], top_k=5)


def test_small_jobs_stay_plain_and_large_ones_are_compiled() -> None:
    choices = labeling_choices(ComputeConfig(device="cpu"), bfloat16=True, compiler=True)
    assert len(choices) == 4

    def chosen(images: int, macs: int) -> tuple[str, bool]:
        best = min(choices, key=lambda choice: labeling_seconds(choice, images, macs))
        return best["dtype"], best["compile"]

    digits, lite = 5_000_000, 400_000_000
    assert chosen(4_000, digits) == ("float32", False)
    assert chosen(2_500, lite) == ("bfloat16", False)
    assert chosen(50_000, lite) == ("bfloat16", True)
    choices = labeling_choices(ComputeConfig(device="cpu"), bfloat16=False, compiler=True)
    assert chosen(2_500, lite) == ("float32", False)
    assert chosen(50_000, lite) == ("float32", True), "a CPU without bfloat16 compiles too"


def test_what_hardware_or_config_do_not_offer_is_not_chosen() -> None:
    cpu = ComputeConfig(device="cpu")
    assert {c["dtype"] for c in labeling_choices(cpu, bfloat16=False, compiler=True)} == {"float32"}
    assert not any(c["compile"] for c in labeling_choices(cpu, bfloat16=True, compiler=False))
    asked = ComputeConfig(device="cpu", dtype="bfloat16", compile="never")
    assert len(labeling_choices(asked, bfloat16=False, compiler=True)) == 1


def test_label_shards_does_nothing_for_no_shards(artifacts: Artifacts, teachers: list[Manifest]) -> None:
    from models.worker import Worker

    spec = {"store": artifacts.store.url, "stage": "predict", "models": [teachers[0].key], "parts": [], "unique": False}
    source = {"kind": artifacts.data.kind, "key": artifacts.data.key}
    assert label_shards({**spec, "source": source, "numerics": {}}, Worker()) == {}
