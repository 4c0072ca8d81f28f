"""Models beside each other: the same images, hand-worked tests of pairs, pictures, and what cannot be compared."""

import io

import numpy as np
import pytest
from PIL import Image

from storage.artifacts import Manifest, get
from storage.errors import UserError
from storage.objects import Store
from tasks.comparison.compare import Group, changed_images, compare
from tasks.comparison.images import correct_images, image_scores
from tasks.comparison.picture import changed_sheet, comparison_picture
from tasks.metrics.significance import bootstrap_chance, mcnemar
from tests.models.artifacts import make_artifacts
from tests.tasks.evaluators.evaluations import evaluate
from tests.tasks.labeling import teacher


class Compared:
    """Three models of a data set and their evaluations."""

    def __init__(self, store: Store, data: Manifest, models: dict[str, Manifest]) -> None:
        self.store, self.data, self.models = store, data, models
        for name, model in models.items():
            inputs = {"data": data, "model": model}
            evaluate(store, "clean", inputs)
            evaluate(store, "corrupted", inputs, kinds=["fog", "contrast"], severities=[3])
            evaluate(store, "fgsm", inputs, epsilons=[0, 4])
            if name != "c":
                evaluate(store, "perturbed", inputs, kinds=["translate"])

    def groups(self, *names: str, baseline: str = "") -> list[Group]:
        """Of some of the models, by the names of their evaluators."""
        return compare(self.store, {name: self.models[name] for name in names}, baseline)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    artifacts = make_artifacts(tmp_path_factory.mktemp("compare"))
    models = {name: teacher(artifacts.store, seed) for name, seed in (("a", 3), ("b", 4), ("c", 5))}
    return Compared(artifacts.store, artifacts.data, models)


def test_numbers_are_those_of_the_evaluations(compared: Compared) -> None:
    groups = {group.evaluator: group for group in compared.groups("a", "b", "c")}
    assert list(groups) == ["clean", "corrupted", "perturbed", "fgsm"]
    for name in ("a", "b", "c"):
        clean = groups["clean"].manifests[name].metrics["test"]
        top1 = groups["clean"].measures[0].values[name]
        assert top1.value == clean["top1"]
        assert top1.low is not None
        assert top1.high is not None
        assert 0 <= top1.low <= top1.value <= top1.high <= 1
        fog = next(m for m in groups["corrupted"].measures if m.name == "fog").values[name]
        assert fog.value == groups["corrupted"].manifests[name].metrics["mean_errors"]["fog"]
    assert set(groups["perturbed"].manifests) == {"a", "b"}, "c has no such evaluation"
    assert [m.name for m in groups["fgsm"].measures] == ["top-1 at 0/255", "top-1 at 4/255"]


def test_the_baselines_own_relative_error_is_100(compared: Compared) -> None:
    for baseline in ("a", "b"):
        (group,) = (g for g in compared.groups("a", "b", baseline=baseline) if g.evaluator == "corrupted")
        relative = next(m for m in group.measures if "relative" in m.name)
        assert relative.values[baseline].value == pytest.approx(100)
        other = "b" if baseline == "a" else "a"
        errors = {n: m.metrics["mean_errors"] for n, m in group.manifests.items()}
        expected = np.mean([errors[other][kind] / errors[baseline][kind] for kind in ("fog", "contrast")])
        assert relative.values[other].value == pytest.approx(100 * expected)


def test_pairs_are_tested_on_the_same_images(compared: Compared) -> None:
    (group,) = (g for g in compared.groups("a", "b") if g.evaluator == "clean")
    (pair,) = group.pairs
    first, second = (correct_images(compared.store, group.manifests[name]) for name in ("a", "b"))
    assert first is not None
    assert second is not None
    assert first[0] == second[0], "the same keys in the same order"
    assert pair.chance == pytest.approx(mcnemar(first[3], second[3]))
    assert pair.difference == pytest.approx(second[3].mean() - first[3].mean())
    assert (pair.won, pair.lost) == (int((~first[3] & second[3]).sum()), int((first[3] & ~second[3]).sum()))
    assert pair.low <= pair.difference <= pair.high
    assert pair.better == "" or pair.chance < 0.05


def test_under_corruptions_pairs_are_tested_image_by_image_on_the_mean_over_all_of_them(compared: Compared) -> None:
    (group,) = (g for g in compared.groups("a", "b") if g.evaluator == "corrupted")
    (pair,) = group.pairs
    first, second = (image_scores(compared.store, group.manifests[name]) for name in ("a", "b"))
    assert first is not None
    assert second is not None
    assert set(np.unique(first)) <= {0, 0.5, 1}, "fog and contrast, one severity"
    for scores, name in ((first, "a"), (second, "b")):
        assert scores.mean() == pytest.approx(group.manifests[name].metrics["top1"])
    assert pair.difference == pytest.approx(second.mean() - first.mean())
    assert (pair.won, pair.lost) == (int((second > first).sum()), int((second < first).sum()))
    assert (pair.test, pair.chance) == ("bootstrap", bootstrap_chance(first, second))
    assert pair.low <= pair.difference <= pair.high


def test_a_model_is_not_better_than_itself(compared: Compared) -> None:
    twin = {"a": compared.models["a"], "again": compared.models["a"]}
    with pytest.raises(UserError, match="have no evaluation in common"):
        compare(compared.store, twin)  # one artifact under two names counts as one model


def test_images_won_are_wrong_by_the_first_and_right_by_the_second(compared: Compared) -> None:
    groups = compared.groups("a", "b")
    changed = changed_images(compared.store, groups, "a", "b", most=3)
    (pair,) = groups[0].pairs
    assert len(changed["won"]) == min(3, pair.won)
    assert len(changed["lost"]) == min(3, pair.lost)
    for row in changed["won"]:
        assert row["b"] == row["label"] != row["a"]
    for row in changed["lost"]:
        assert row["a"] == row["label"] != row["b"]
    sheet = changed_sheet(compared.store, compared.data, changed, "a", "b")
    assert sheet.width > 100


def test_one_picture_shows_all_of_it(compared: Compared) -> None:
    groups = compared.groups("a", "b", "c")
    png = comparison_picture(groups, ["a", "b", "c"])
    assert comparison_picture(groups, ["a", "b", "c"]) == png
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert pixels.shape[0] > pixels.shape[1] / 2
    for color in ((0x37, 0x41, 0x51), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # one for each model
        assert (pixels == color).all(axis=-1).any()


def test_models_without_a_common_evaluation_are_refused_with_what_to_do(compared: Compared) -> None:
    stranger = teacher(compared.store, 99)
    with pytest.raises(UserError, match="a, d have no evaluation in common; measure each .* nst evaluate clean a"):
        compare(compared.store, {"a": compared.models["a"], "d": stranger})


def test_evaluations_with_other_settings_are_not_laid_beside_each_other(compared: Compared) -> None:
    stranger = teacher(compared.store, 98)
    evaluate(compared.store, "corrupted", {"data": compared.data, "model": stranger}, kinds=["fog"], severities=[5])
    evaluate(compared.store, "clean", {"data": compared.data, "model": stranger})
    groups = compare(compared.store, {"a": compared.models["a"], "d": stranger})
    assert [group.evaluator for group in groups] == ["clean"]
    assert get(compared.store, "model", stranger.key) == stranger
