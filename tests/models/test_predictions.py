"""Predictions in Parquet: who is what in one small file, all probabilities or the top k in another."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.loader import IndexedImages
from models.predictions import (
    key_hashes,
    predictions_table,
    probabilities_table,
    read_predictions,
    read_probabilities,
    restore_probabilities,
)
from models.pseudo_labels import PseudoLabels
from storage.shards import read_index, shard_files, write_parquet
from tests.models.artifacts import CLASSES, Artifacts, label_by_hand

HALF = 2.0**-11  # relative rounding of fp16


def distributions(rows: int, classes: int, seed: int = 0, sharpness: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(classes, sharpness), rows).astype(np.float32)


def through_a_file(folder: Path, probabilities: np.ndarray, top_k: int) -> np.ndarray:
    write_parquet(folder / "p.parquet", probabilities_table(probabilities, top_k))
    return restore_probabilities(pq.read_table(folder / "p.parquet"), probabilities.shape[1])


def test_a_row_says_the_class_its_confidence_and_the_hash_of_its_key() -> None:
    table = predictions_table(["a", "ä/1"], np.array([[0.1, 0.7, 0.2], [0.4, 0.2, 0.4]], np.float32))
    assert table["key"].to_pylist() == ["a", "ä/1"]
    assert table["label"].to_pylist() == [1, 0], "of two that are alike the lower class"
    assert table["confidence"].to_pylist() == pytest.approx([0.7, 0.4])
    expected = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in ("a", "ä/1")]
    assert table["key_hash"].to_pylist() == expected
    assert key_hashes([]).shape == (0,)


def test_all_classes_come_back_as_they_were_rounded(tmp_path: Path) -> None:
    probabilities = distributions(50, 12)
    assert np.array_equal(through_a_file(tmp_path, probabilities, 0), probabilities.astype(np.float16))


def test_top_classes_fall_in_probability_and_ties_go_by_class() -> None:
    table = probabilities_table(np.array([[0.1, 0.3, 0.1, 0.3, 0.2]], np.float32), top_k=4)
    assert table["top_classes"].to_pylist() == [[1, 3, 4, 0]]
    assert table["top_probabilities"].to_pylist() == [pytest.approx([0.3, 0.3, 0.2, 0.1], rel=HALF)]


def test_missing_mass_is_spread_evenly_over_the_other_classes() -> None:
    table = probabilities_table(np.array([[0.5, 0.26, 0.04, 0.16, 0.04]], np.float32), top_k=2)
    restored = restore_probabilities(table, 5)
    assert restored.dtype == np.float16
    assert restored[0].tolist() == pytest.approx([0.5, 0.26, 0.08, 0.08, 0.08], abs=1e-3)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Guo et al., arXiv:1706.04599, equation 3, with 15 bins."""
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(correct[bins == b].sum() - confidence[bins == b].sum(dtype=float)) for b in range(15)]
    return float(sum(gaps) / len(confidence))


def test_calibration_of_the_first_class_is_exact_whatever_is_left_out(tmp_path: Path) -> None:
    """Confidence is stored apart: no mass is missing there, and nothing is rounded to fp16."""
    probabilities = distributions(2000, 20)
    truth = np.random.default_rng(1).integers(0, 20, 2000)
    table = predictions_table([str(n) for n in range(2000)], probabilities)
    confidence, correct = table["confidence"].to_numpy(), table["label"].to_numpy() == truth
    assert np.array_equal(confidence, probabilities.max(axis=1))
    restored = through_a_file(tmp_path, probabilities, top_k=1)
    assert not np.array_equal(restored.max(axis=1), confidence), "fp16 would not be exact"
    exact = expected_calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == truth)
    assert expected_calibration_error(confidence, correct) == exact > 0.1
    assert expected_calibration_error(restored.max(axis=1).astype(float), correct) == pytest.approx(exact, abs=2e-3)


def test_the_log_loss_of_a_class_that_was_left_out_is_that_of_an_even_share(tmp_path: Path) -> None:
    """Neither infinite, as of a cut distribution, nor does the first class gain, as in a rescaled one."""
    restored = through_a_file(tmp_path, np.array([[0.5, 0.26, 0.04, 0.16, 0.04]], np.float32), top_k=2)[0].astype(float)
    assert -np.log(restored[[2, 3, 4]]) == pytest.approx([-np.log(0.24 / 3)] * 3, abs=5e-3)
    assert -np.log(restored[0]) == pytest.approx(-np.log(0.5), abs=1e-3)


@given(
    classes=st.integers(2, 300), share=st.floats(0, 1), sharpness=st.sampled_from([0.01, 0.3, 5.0]), seed=st.integers(0)
)
def test_restored_rows_are_distributions_with_the_same_first_class(
    classes: int, share: float, sharpness: float, seed: int
) -> None:
    probabilities = distributions(4, classes, seed, sharpness)
    top_k = 1 + round(share * (classes - 1))
    restored = restore_probabilities(probabilities_table(probabilities, top_k), classes).astype(np.float64)
    assert restored.sum(axis=1) == pytest.approx(np.ones(4), abs=2e-3)
    assert (restored >= 0).all()
    best = probabilities.argmax(axis=1)[:, None]
    assert np.take_along_axis(restored, best, 1) == pytest.approx(restored.max(axis=1, keepdims=True))


def test_a_thousand_classes_with_little_missing_still_sum_to_one() -> None:
    """A tenth of a percent over 990 classes is 1e-6 each, where fp16's steps are 6e-8."""
    probabilities = distributions(20, 1000, sharpness=0.001)
    restored = restore_probabilities(probabilities_table(probabilities, 10), 1000)
    assert restored.sum(axis=1, dtype=np.float64) == pytest.approx(np.ones(20), abs=1e-3)


@pytest.mark.parametrize(("top_k", "classes"), [(4, 3), (-1, 3), (5, 40_000)])
def test_a_top_k_that_does_not_fit_is_refused(top_k: int, classes: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k={top_k} does not fit {classes} classes"):
        probabilities_table(np.full((1, classes), 1 / classes, np.float32), top_k)


def test_rows_of_a_shard_are_read_in_the_order_they_are_asked_for(artifacts: Artifacts) -> None:
    entry = artifacts.labels.files_under("probabilities/")[1]
    everything = read_probabilities(artifacts.store, artifacts.labels, entry)
    assert everything.shape == (24, len(CLASSES))
    some = read_probabilities(artifacts.store, artifacts.labels, entry, [7, 0, 7])
    assert np.array_equal(some, everything[[7, 0, 7]])


def test_a_student_reads_distributions_from_top_k_labels(artifacts: Artifacts) -> None:
    """Labels joined by key: with two of four classes stored, the other two share what is missing."""
    labels = {k: label_by_hand(artifacts.store, artifacts.data, top_k=k) for k in (0, 2)}
    images = IndexedImages(artifacts.store, artifacts.selection, "train")
    rows = np.arange(len(images))
    full, cut = (PseudoLabels(artifacts.store, artifacts.selection, images, labels[k]).rows(rows) for k in (0, 2))
    assert cut.dtype == np.float32
    assert cut.sum(axis=1) == pytest.approx(np.ones(len(images)), abs=2e-3)
    ranked, ranked_cut = -np.sort(-full, axis=1), -np.sort(-cut, axis=1)
    assert ranked_cut[:, :2] == pytest.approx(ranked[:, :2], abs=1e-3)
    assert ranked_cut[:, 2:] == pytest.approx(ranked[:, 2:].mean(axis=1, keepdims=True).repeat(2, axis=1), abs=1e-3)
    assert np.array_equal(full.argmax(axis=1), cut.argmax(axis=1))


def test_small_files_are_in_the_order_of_the_index(artifacts: Artifacts) -> None:
    keys = read_index(artifacts.store, artifacts.data, "unlabeled", ["key"])["key"].to_pylist()
    assert read_predictions(artifacts.store, artifacts.labels, ["key"])["key"].to_pylist() == keys
    names = [entry.name for entry in artifacts.labels.files_under("predictions/")]
    assert len(names) == len(shard_files(artifacts.data, "unlabeled"))
    assert names == sorted(names)
