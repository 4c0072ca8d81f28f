"""Batches are a pure function of the step: not of loader processes, nor of where a loader starts."""

import io
import shutil
import tarfile
import tempfile
from collections import Counter
from multiprocessing import current_process
from pathlib import Path

import numpy as np
import pytest
import torch

from models import loader
from models.configs import TrainConfig
from models.loader import IndexedImages, ReplicaBatch, TrainingBatches, normalize, training_loader
from models.order import LABELED_STREAM, UNLABELED_STREAM, SampleOrder
from models.predictions import read_predictions, read_probabilities
from models.pseudo_labels import PseudoLabels
from storage.artifacts import Manifest
from storage.errors import MissingObject, StoreError
from storage.objects import Store
from storage.shards import shard_files
from tests.models.artifacts import CLASSES, Artifacts, label_by_hand

STEPS = 9  # 72 labeled and 144 unlabeled images: into the second and third epoch
CONFIG = TrainConfig.model_validate(
    {
        "model": {"name": "any", "image_size": 16},
        "labeled_batch": 8,
        "batch_ratio": 2,
        "replicas": 2,
        "shuffle_shards": 2,
        "seed": 11,
        "noise": {"crop": "resized", "num_ops": 2, "magnitude": 9},
    }
)


def batches(
    artifacts: Artifacts, config: TrainConfig = CONFIG, replicas: range = range(2), labels: Manifest | None = None
) -> TrainingBatches:
    store = artifacts.store
    unlabeled = IndexedImages(store, artifacts.selection, "train")
    pseudo = PseudoLabels(store, artifacts.selection, unlabeled, labels)
    return TrainingBatches(config, IndexedImages(store, artifacts.data, "labeled"), unlabeled, pseudo, replicas)


def same(first: list[ReplicaBatch], second: list[ReplicaBatch]) -> bool:
    parts = ("images", "labels", "pseudo_labels")
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(getattr(a, part), getattr(b, part)) for a, b in pairs for part in parts)


@pytest.fixture(scope="module")
def undisturbed(artifacts: Artifacts) -> list[list[ReplicaBatch]]:
    return [batches(artifacts)[step] for step in range(STEPS)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first_step", [0, 5])
def test_a_batch_does_not_depend_on_loader_processes_or_on_the_first_step(
    artifacts: Artifacts, undisturbed: list[list[ReplicaBatch]], workers: int, first_step: int
) -> None:
    found = list(training_loader(batches(artifacts), first_step, STEPS, workers))
    assert len(found) == STEPS - first_step
    assert all(same(*pair) for pair in zip(found, undisturbed[first_step:], strict=True))


def test_a_temporary_folder_with_a_long_path_holds_no_batch_up(
    artifacts: Artifacts, undisturbed: list[list[ReplicaBatch]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors travel over sockets made there, and a socket's path may have 107 bytes."""
    folder = tmp_path / ("long " * 20)
    folder.mkdir()
    monkeypatch.setattr(loader, "BATCH_TIMEOUT_S", 20)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    found = list(training_loader(batches(artifacts), STEPS - 2, STEPS, 1))
    assert all(same(*pair) for pair in zip(found, undisturbed[-2:], strict=True))
    assert tempfile.tempdir == str(folder)


def test_batches_differ_between_steps_replicas_and_seeds(
    artifacts: Artifacts, undisturbed: list[list[ReplicaBatch]]
) -> None:
    seen = {part.images.numpy().tobytes() for batch in undisturbed for part in batch}
    assert len(seen) == STEPS * 2
    other = batches(artifacts, CONFIG.model_copy(update={"seed": 12}))[0]
    assert not same(other, undisturbed[0])


def test_an_image_is_noised_anew_in_each_epoch(artifacts: Artifacts) -> None:
    subject = batches(artifacts)
    order = SampleOrder([24, 24], CONFIG.seed, LABELED_STREAM, CONFIG.shuffle_shards)
    rows = order.rows(0, 96)
    again = int(np.flatnonzero(rows[48:] == rows[0])[0]) + 48
    step, place = divmod(again, 8)
    second = subject[step][place // 4].images[place % 4]
    assert not torch.equal(subject[0][0].images[0], second)


def test_a_rank_makes_its_own_replicas_of_the_same_batches(
    artifacts: Artifacts, undisturbed: list[list[ReplicaBatch]]
) -> None:
    second_rank = batches(artifacts, replicas=range(1, 2))
    assert all(same(second_rank[step], undisturbed[step][1:]) for step in range(STEPS))


@pytest.mark.parametrize(("ratio", "unlabeled"), [(1, 4), (2, 8), (3.5, 14), (0.1, 1)])
def test_every_replica_has_the_true_ratio_of_unlabeled_to_labeled_images(
    artifacts: Artifacts, ratio: float, unlabeled: int
) -> None:
    config = CONFIG.model_copy(update={"batch_ratio": ratio})
    for part in batches(artifacts, config)[3]:
        assert len(part.labels) == 4
        assert part.pseudo_labels.shape == (unlabeled, len(CLASSES))
        assert part.images.shape == (4 + unlabeled, 16, 16, 3)
        assert part.images.dtype == torch.uint8
        assert part.pseudo_labels.dtype == torch.float32


def test_an_epoch_holds_every_labeled_image_once_with_its_label(artifacts: Artifacts) -> None:
    plain = {"crop": "none", "flip": False, "num_ops": 0}
    config = CONFIG.model_copy(update={"noise": CONFIG.noise.model_validate(plain)})
    source = IndexedImages(artifacts.store, artifacts.data, "labeled")
    expected = Counter((np.asarray(source.image(row)).tobytes(), int(source.labels[row])) for row in range(len(source)))
    subject = batches(artifacts, config)
    found: Counter[tuple[bytes, int]] = Counter()
    for step in range(6):
        for part in subject[step]:
            found.update(
                (image.numpy().tobytes(), int(label)) for image, label in zip(part.images, part.labels, strict=False)
            )
    assert found == expected


@pytest.mark.parametrize("kept", [True, False], ids=["decoded once", "decoded anew"])
def test_pixels_and_pictures_are_the_same_whichever_is_asked_for_first(
    artifacts: Artifacts, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.loader.CACHE_BYTES", 1 << 30 if kept else 0)
    first, second = (IndexedImages(artifacts.store, artifacts.data, "labeled") for _ in range(2))
    for row in range(len(first)):
        pixels, picture = first.pixels(row), second.image(row)
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture))
        assert torch.equal(second.pixels(row), pixels)
        assert np.array_equal(np.asarray(first.image(row)), np.asarray(picture))


def pseudo_labels_by_picture(artifacts: Artifacts, labels: Manifest) -> dict[bytes, bytes]:
    """What each unlabeled picture's label must be, from the labels artifact and the prepared shards."""
    table = read_predictions(artifacts.store, labels)
    parts = [read_probabilities(artifacts.store, labels, entry) for entry in labels.files_under("probabilities/")]
    rows = np.concatenate(parts).astype(np.float32)
    by_key = dict(zip(table["key"].to_pylist(), rows, strict=True))
    source = IndexedImages(artifacts.store, artifacts.data, "unlabeled")
    keys = source.index["key"].to_pylist()
    return {np.asarray(source.image(row)).tobytes(): by_key[keys[row]].tobytes() for row in range(len(source))}


@pytest.mark.parametrize("joined", [False, True], ids=["baked", "joined"])
def test_pseudo_labels_belong_to_their_images(artifacts: Artifacts, joined: bool) -> None:
    labels = label_by_hand(artifacts.store, artifacts.data, seed=1) if joined else artifacts.labels
    expected = pseudo_labels_by_picture(artifacts, labels)
    assert len(expected) == 72, "two pictures are alike: a mix-up of them could not be seen"
    plain = CONFIG.noise.model_validate({"crop": "none", "flip": False, "num_ops": 0})
    config = CONFIG.model_copy(update={"unlabeled_noise": plain})
    subject = batches(artifacts, config, labels=labels if joined else None)
    checked = 0
    for step in range(4):  # an epoch of 64
        for part in subject[step]:
            for image, label in zip(part.images[4:], part.pseudo_labels, strict=True):
                assert expected[image.numpy().tobytes()] == label.numpy().tobytes()
                checked += 1
    assert checked == 64


def test_joined_labels_are_the_same_with_room_for_one_row_group_of_one_file(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = label_by_hand(artifacts.store, artifacts.data, seed=1)
    images = IndexedImages(artifacts.store, artifacts.selection, "train")
    rows = np.random.default_rng(0).permutation(len(images))
    roomy = PseudoLabels(artifacts.store, artifacts.selection, images, labels).rows(rows)
    monkeypatch.setattr("models.pseudo_labels.CACHE_BYTES", 1)
    monkeypatch.setattr("models.pseudo_labels.OPEN_FILES", 1)
    tight = PseudoLabels(artifacts.store, artifacts.selection, images, labels)
    assert np.array_equal(tight.rows(rows), roomy)
    assert len(tight._source._groups) == len(tight._source._open) == 1  # type: ignore[union-attr]


def test_labels_of_another_selection_are_refused(artifacts: Artifacts) -> None:
    labels = label_by_hand(artifacts.store, artifacts.data)
    short = labels.model_copy(update={"files": labels.files[:1]})
    with pytest.raises(StoreError, match="have no label for image"):
        batches(artifacts, labels=short)


def test_unlabeled_images_may_have_a_noise_of_their_own(
    artifacts: Artifacts, undisturbed: list[list[ReplicaBatch]]
) -> None:
    """The paper's study 1: standard augmentation on unlabeled data."""
    plain = CONFIG.noise.model_validate({"crop": "none", "num_ops": 0})
    part = batches(artifacts, CONFIG.model_copy(update={"unlabeled_noise": plain}))[0][0]
    assert torch.equal(part.images[:4], undisturbed[0][0].images[:4])
    assert not torch.equal(part.images[4:], undisturbed[0][0].images[4:])


def test_a_teachers_batches_hold_labeled_images_only(artifacts: Artifacts) -> None:
    labeled = IndexedImages(artifacts.store, artifacts.data, "labeled")
    part = TrainingBatches(CONFIG, labeled, None, None, range(2))[0][0]
    assert len(part.images) == len(part.labels) == 4
    assert len(part.pseudo_labels) == 0


@pytest.fixture
def damaged(artifacts: Artifacts, tmp_path: Path) -> Artifacts:
    """A copy that a test may damage."""
    shutil.copytree(artifacts.store.root, tmp_path / "store")
    return Artifacts(Store(str(tmp_path / "store")), artifacts.data, artifacts.labels, artifacts.selection)


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x01
    path.write_bytes(data)


def member_place(path: Path, suffix: str) -> int:
    """Where the last bytes of the first member with this suffix lie."""
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(suffix))
        return member.offset_data + member.size - 1


def read_all(subject: TrainingBatches) -> None:
    for step in range(6):
        subject[step]


@pytest.mark.parametrize(("kind", "split"), [("data", "labeled"), ("selection", "train")])
def test_a_flipped_byte_of_an_image_is_an_error_that_names_the_shard(damaged: Artifacts, kind: str, split: str) -> None:
    shard = shard_files(getattr(damaged, kind), split)[1]
    local = damaged.store.local_path(shard.path)
    flip_byte(local, member_place(local, ".png"))
    with pytest.raises(StoreError, match=shard.path):
        read_all(batches(damaged))


def test_a_damaged_soft_label_is_an_error_that_names_the_shard(damaged: Artifacts) -> None:
    shard = shard_files(damaged.selection, "train")[1]
    local = damaged.store.local_path(shard.path)
    with tarfile.open(local) as tar:
        member = next(m for m in tar if m.name.endswith(".npy"))
    flip_byte(local, member.offset_data + member.size - 1)  # in the numbers: still a valid file
    with pytest.raises(StoreError, match=shard.path):
        read_all(batches(damaged))


def test_a_missing_shard_is_an_error_that_names_it(damaged: Artifacts) -> None:
    shard = shard_files(damaged.data, "labeled")[0]
    damaged.store.delete(shard.path)
    with pytest.raises(StoreError, match=shard.path):
        read_all(batches(damaged))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_loader_process_is_one_line_as_in_this_process(damaged: Artifacts, workers: int) -> None:
    shard = shard_files(damaged.data, "labeled")[0]
    damaged.store.delete(shard.path)
    with pytest.raises(MissingObject) as caught:
        list(training_loader(batches(damaged), 0, 6, workers))
    assert str(caught.value).count("\n") == 0
    assert f"object {shard.path} is missing" in str(caught.value)


def test_normalization_is_the_textbook_one_in_channels_last_memory() -> None:
    images = torch.arange(2 * 5 * 4 * 3, dtype=torch.uint8).reshape(2, 5, 4, 3)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
    found = normalize(images, mean, std)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_selections_soft_labels_are_numpy_files_that_others_read(artifacts: Artifacts) -> None:
    local = artifacts.store.local_path(shard_files(artifacts.selection, "train")[0].path)
    with tarfile.open(local) as tar:
        member = tar.extractfile(next(m for m in tar if m.name.endswith(".npy")))
        assert member is not None
        assert np.load(io.BytesIO(member.read())).sum() == pytest.approx(1, abs=1e-3)


def test_the_streams_of_labeled_and_unlabeled_images_are_numbered_forever() -> None:
    """They are part of every sample's seed: other numbers would change every model."""
    assert (LABELED_STREAM, UNLABELED_STREAM) == (1, 2)
