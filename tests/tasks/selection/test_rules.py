import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import StoreError, UserError
from tasks.selection.config import SelectConfig
from tasks.selection.rules import DECISIONS, ClassCounts, count_classes, find_rules
from tests.tasks.selection.predicted import NAMES, Fate, Row, expected_fates, predicted

CONFIDENCES = [0.0, 0.375, 0.5, 0.59, 0.6, 0.7, 0.875, 1.0]  # few, so that ties and exact thresholds are common


def decided(folder: Path, files: Sequence[Sequence[Row]], config: SelectConfig) -> tuple[dict[str, Fate], ClassCounts]:
    """What the rules say of each key, and the counts."""
    predictions = predicted(folder, files)
    rules, counts = find_rules(predictions, config), ClassCounts.none(predictions.num_classes)
    fates: dict[str, Fate] = {}
    every = predictions.scan(lambda b: (b.keys(np.arange(len(b))).to_pylist(), b.labels, *rules.decide(b)))
    for keys, labels, decisions, copies in every:
        counts.add(labels, decisions, copies)
        fates |= {k: (DECISIONS[d], int(n)) for k, d, n in zip(keys, decisions, copies, strict=True)}
    return fates, counts


def cut(rows: list[Row], num_files: int) -> list[list[Row]]:
    return [own for own in (rows[number::num_files] for number in range(num_files)) if own]


row_lists = st.lists(
    st.tuples(st.text("abZ_-é猫0", min_size=1, max_size=4), st.integers(0, 2), st.sampled_from(CONFIDENCES)),
    min_size=1,
    max_size=25,
    unique_by=lambda row: row[0],
)
settings = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["exact", "reference"]),
        "min_confidence": st.sampled_from([0.0, 0.4, 0.5, 0.6, 0.7]),
        "max_confidence": st.sampled_from([None, None, 0.875, 1.0]),
        "balance": st.booleans(),
        "images_per_class": st.integers(1, 12),
        "subset": st.sampled_from([1.0, 1.0, 0.5, 1 / 128]),
        "on_empty_class": st.sampled_from(["skip", "best"]),
        "seed": st.integers(0, 3),
    }
)


def as_config(fields: dict) -> SelectConfig | None:
    try:
        return SelectConfig(**fields)
    except ValidationError:
        return None


configs = settings.map(as_config).filter(lambda config: config is not None)


@given(row_lists, configs, st.integers(1, 3))
@example(
    [("b", 0, 0.7), ("a", 0, 0.7), ("c", 1, 0.6)],
    SelectConfig(min_confidence=0.7, images_per_class=1, on_empty_class="skip"),
    1,
)
def test_every_fate_and_count_is_that_of_the_rules_in_plain_python(
    rows: list[Row], config: SelectConfig, num_files: int
) -> None:
    expected = expected_fates(rows, config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            found, counts = decided(folder, cut(rows, num_files), config)
        except UserError:
            assert not {decision for decision, _ in expected.values()} - {"below_confidence", "above_confidence"}
            return
        planned = count_classes(predicted(folder, cut(rows, num_files)), config)
    assert found == expected
    table = counts.table(NAMES).to_pylist()
    assert table == planned.table(NAMES).to_pylist()
    for row in table:
        own = [expected[key] for key, label, _ in rows if label == row["label"]]
        by_decision = Counter(decision for decision, _ in own)
        assert {name: row[name] for name in DECISIONS} == {name: by_decision[name] for name in DECISIONS}
        assert (row["available"], row["copies"]) == (len(own), sum(copies for _, copies in own))
        assert row["kept"] + row["dropped"] == row["available"]
        assert row["kept"] + row["duplicated"] == row["copies"]
        if config.method == "exact" and config.balance and config.subset == 1:
            assert row["copies"] in (0, config.images_per_class)


def test_a_case_worked_out_by_hand(tmp_path: Path) -> None:
    rows = [("d", 0, 0.5), ("a", 0, 0.9), ("c", 0, 0.6), ("b", 0, 0.6), ("x", 1, 0.9), ("y", 1, 0.4)]
    found, _ = decided(tmp_path, [rows], SelectConfig(min_confidence=0.5, images_per_class=2, on_empty_class="skip"))
    assert found == {
        "a": ("kept", 1),
        "b": ("kept", 1),  # ties go by key
        "c": ("over_cap", 0),
        "d": ("over_cap", 0),
        "x": ("kept", 2),
        "y": ("below_confidence", 0),
    }


def test_a_confidence_equal_to_the_threshold_is_kept_though_float32_rounds_it_down(tmp_path: Path) -> None:
    assert float(np.float32(0.7)) < 0.7
    found, _ = decided(tmp_path, [[("a", 0, 0.7)]], SelectConfig(min_confidence=0.7, on_empty_class="skip"))
    assert found["a"][0] == "kept"


def test_neighboring_intervals_share_no_image_and_leave_none_out(tmp_path: Path) -> None:
    rows = [(f"k{n:03d}", 0, n / 200) for n in range(201)]
    seen: list[str] = []
    for tenth in range(10):
        bounds = {"min_confidence": tenth / 10, "max_confidence": (tenth + 1) / 10}
        found, _ = decided(tmp_path / str(tenth), [rows], SelectConfig(balance=False, on_empty_class="skip", **bounds))
        seen += [key for key, (decision, _) in found.items() if decision == "kept"]
    assert sorted(seen) == [key for key, _, _ in rows]


def saturated(num: int, label: int = 0) -> list[Row]:
    """Images of a network that is sure of everything."""
    return [(f"{n * 7919 % num:06d}", label, 1.0) for n in range(num)]


def test_of_images_that_are_all_certain_the_first_by_key_are_kept(tmp_path: Path) -> None:
    rows = saturated(150_000)  # three row groups
    config = SelectConfig(images_per_class=70_001, on_empty_class="skip")
    found, counts = decided(tmp_path, [rows[:100_000], rows[100_000:]], config)
    assert sorted(key for key, (decision, _) in found.items() if decision == "kept") == [
        f"{n:06d}" for n in range(70_001)
    ]
    assert counts.copies.tolist() == [70_001, 0, 0]


def test_how_predictions_are_cut_into_files_decides_nothing(tmp_path: Path) -> None:
    rows = [(f"k{n}", n % 3, CONFIDENCES[n % 7]) for n in range(60)]
    for number, fields in enumerate([{}, {"method": "reference"}, {"subset": 0.5}, {"balance": False}]):
        config = SelectConfig(min_confidence=0.5, images_per_class=7, **fields)
        cuts = [[rows], [rows[:4], rows[4:]], [rows[20:], rows[:11], rows[11:20]]]
        found = [decided(tmp_path / f"{number}-{n}", cut, config)[0] for n, cut in enumerate(cuts)]
        assert found[0] == found[1] == found[2]


def test_the_seed_chooses_who_is_duplicated_and_nothing_else(tmp_path: Path) -> None:
    rows = [(f"k{n}", 0, 0.9) for n in range(20)]
    lucky = []
    for seed in (0, 0, 1):
        config = SelectConfig(images_per_class=30, seed=seed, on_empty_class="skip")
        found, _ = decided(tmp_path / str(len(lucky)), [rows], config)
        assert Counter(copies for _, copies in found.values()) == {1: 10, 2: 10}
        lucky.append({key for key, (_, copies) in found.items() if copies == 2})
    assert lucky[0] == lucky[1]
    assert lucky[0] != lucky[2]


def test_a_smaller_subset_lies_within_a_larger_one_and_has_its_share(tmp_path: Path) -> None:
    rows = [(f"k{n}", n % 3, 0.4 + 0.5 * (n % 1000) / 1000) for n in range(6000)]
    larger = None
    for number, share in enumerate([1.0, 1 / 4, 1 / 16, 1 / 64]):
        found, _ = decided(tmp_path / str(number), [rows], SelectConfig(images_per_class=1500, subset=share))
        kept = {key: copies for key, (_, copies) in found.items() if copies}
        assert abs(len(kept) - 4500 * share) < 4 * (4500 * share) ** 0.5
        assert larger is None or kept.items() < larger.items()
        larger = kept


@pytest.mark.parametrize("available", [300, 3000])  # fewer and more than wanted
def test_the_reference_method_gives_each_image_the_expected_number_of_copies(tmp_path: Path, available: int) -> None:
    rows = [(f"k{n}", 0, 0.605) for n in range(available)] + [(f"low{n}", 0, 0.45) for n in range(50)]
    copies = np.zeros((40, available))
    for seed in range(40):
        config = SelectConfig(
            method="reference", images_per_class=1000, seed=seed, min_confidence=0.5, on_empty_class="skip"
        )
        found, _ = decided(tmp_path / str(seed), [rows], config)
        copies[seed] = [found[key][1] for key, _, confidence in rows if confidence > 0.5]
        assert not any(found[key][1] for key, _, confidence in rows if confidence < 0.5)
    wanted = 1000 / available
    spread = (wanted % 1 * (1 - wanted % 1)) ** 0.5
    assert set(np.unique(copies)) == {np.floor(wanted), np.ceil(wanted)}
    assert abs(copies.mean() - wanted) < 5 * spread / copies.size**0.5
    assert np.abs(copies.mean(axis=0) - wanted).max() < 6 * spread / 40**0.5, "every image has the same chance"


def test_the_reference_threshold_is_the_highest_on_the_grid_that_leaves_enough(tmp_path: Path) -> None:
    rows = [("a", 0, 0.955), ("b", 0, 0.9), ("c", 0, 0.895), ("d", 0, 0.5)]
    predictions = predicted(tmp_path, [rows])
    for wanted, threshold in [(1, 0.95), (2, 0.9), (3, 0.89), (4, 0.5), (5, 0.35)]:
        config = SelectConfig(method="reference", min_confidence=0.35, images_per_class=wanted, on_empty_class="skip")
        assert find_rules(predictions, config).thresholds()[0] == np.float32(threshold)


def test_the_threshold_of_a_class_is_the_confidence_of_its_last_kept_image(tmp_path: Path) -> None:
    rows = [("a", 0, 0.9), ("b", 0, 0.8), ("c", 0, 0.8), ("d", 0, 0.7), ("x", 1, 0.6)]
    predictions = predicted(tmp_path, [rows])
    for cap, threshold in [(1, 0.9), (2, 0.8), (3, 0.8), (4, 0.3)]:
        rules = find_rules(predictions, SelectConfig(images_per_class=cap, on_empty_class="skip"))
        assert rules.thresholds()[:2].tolist() == [float(np.float32(threshold)), float(np.float32(0.3))]


def test_a_class_without_an_image_is_an_error_that_names_class_threshold_and_remedy(tmp_path: Path) -> None:
    predictions = predicted(tmp_path, [[("a", 0, 0.95), ("b", 1, 0.5)]])
    with pytest.raises(UserError) as error:
        find_rules(predictions, SelectConfig(min_confidence=0.9, max_confidence=0.99))
    assert "class 1 (dog) (and 1 more) has 0 images at confidence >= 0.90 and < 0.99" in str(error.value)
    assert "Lower select.min_confidence, or set select.on_empty_class=skip" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "suggested"),
    [({}, True), ({"balance": False}, False), ({"method": "reference"}, False)],
    ids=["exact", "unbalanced", "reference"],
)
def test_an_empty_class_is_told_of_no_remedy_that_is_refused(tmp_path: Path, fields: dict, suggested: bool) -> None:
    predictions = predicted(tmp_path, [[("a", 0, 0.95), ("b", 1, 0.5)]])
    with pytest.raises(UserError, match="on_empty_class=skip") as error:
        find_rules(predictions, SelectConfig(min_confidence=0.9, **fields))
    assert ("=best" in str(error.value)) is suggested
    assert ("cannot be balanced" in str(error.value)) is fields.get("balance", True)


def test_a_class_without_any_image_stays_empty_beside_those_that_take_their_best(tmp_path: Path) -> None:
    predictions = predicted(tmp_path, [[("a", 0, 0.95), ("b", 1, 0.5)]])
    counts = count_classes(predictions, SelectConfig(min_confidence=0.9, images_per_class=2, on_empty_class="best"))
    assert counts.copies.tolist() == [2, 2, 0]


def test_a_selection_of_nothing_is_an_error_even_where_classes_may_be_empty(tmp_path: Path) -> None:
    predictions = predicted(tmp_path, [[("a", 0, 0.95), ("b", 1, 0.5)]])
    with pytest.raises(UserError, match=r"class 0 \(cat\) \(and 2 more\) has 0 images"):
        find_rules(predictions, SelectConfig(min_confidence=1.0, on_empty_class="skip"))


def test_an_empty_class_takes_its_best_below_the_threshold_and_the_others_do_not_change(tmp_path: Path) -> None:
    rows = [("a", 0, 0.9), ("b", 0, 0.5), ("x", 1, 0.45), ("y", 1, 0.4), ("z", 1, 0.35)]
    config = SelectConfig(min_confidence=0.6, images_per_class=2, on_empty_class="best")
    found, _ = decided(tmp_path, [rows], config)
    assert found == {
        "a": ("kept", 2),
        "b": ("below_confidence", 0),
        "x": ("kept", 1),
        "y": ("kept", 1),
        "z": ("over_cap", 0),
    }


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("k", 3, 0.5), "row 1 has label 3 and confidence 0.5"),
        (("k", -1, 0.5), "row 1 has label -1"),
        (("k", 0, float("nan")), "confidence nan"),
        (("k", 0, 1.5), "confidence 1.5"),
        (("k", 0, -0.5), "confidence -0.5"),
    ],
)
def test_what_is_no_prediction_is_refused_by_file_and_row(tmp_path: Path, row: Row, words: str) -> None:
    predictions = predicted(tmp_path, [[("a", 0, 0.9), row]])
    with pytest.raises(StoreError, match="verify the artifact or label again") as error:
        find_rules(predictions, SelectConfig())
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_confidence": 0.5, "max_confidence": 0.5}, "max_confidence=0.5 must be above min_confidence=0.5"),
        ({"balance": False, "method": "reference"}, "method=reference balances the classes"),
        ({"balance": False, "on_empty_class": "best"}, "needs balance=true and method=exact"),
        ({"method": "reference", "on_empty_class": "best"}, "needs balance=true and method=exact"),
        ({"subset": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SelectConfig(**fields)
