"""`nst export` writes a model card that huggingface_hub reads, whose words and numbers are the store's."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from models import zoo
from models.configs import ModelConfig, TrainConfig
from storage.artifacts import Manifest, commit, get, list_artifacts
from storage.keys import digest
from storage.objects import Store
from storage.runs import resolve_ref, set_ref
from tests.flows.runs import nst
from tests.models.artifacts import commit_model

REF = "digits/1/student"
HOSTILE = ("a|b", "<script>", "`x` *y* [z](w)")


class Exported:
    """A finished run's student with one more evaluation, in its folder."""

    def __init__(self, finished: Path, folder: Path) -> None:
        self.place = Path(shutil.copytree(finished, folder / "store"))
        self.store = Store(str(self.place))
        nst(
            "evaluate",
            "corrupted",
            REF,
            "kinds=[fog,contrast]",
            "severities=[1]",
            "--store",
            str(self.place),
            cwd=folder,
        )
        self.folder = folder / "model"
        printed = nst("export", REF, str(self.folder), "--store", str(self.place), cwd=folder)
        assert f"local-dir:{self.folder}" in printed
        self.card = ModelCard.load(self.folder / "README.md")
        self.model = get(self.store, "model", resolve_ref(self.store, REF).key)

    def evaluation(self, stage: str) -> Manifest:
        """The student's evaluation of that stage."""
        (found,) = (
            m
            for m in list_artifacts(self.store, kind="evaluation")
            if m.stage == stage and m.inputs["model"] == self.model.key
        )
        return found


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(finished, tmp_path_factory.mktemp("card"))


def test_the_hubs_own_reader_finds_library_tags_and_data_in_the_card(exported: Exported) -> None:
    data = exported.card.data
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("timm", "image-classification", ["ylecun/mnist"])
    assert {"image-classification", "noisy-student-training"} <= set(data.tags)
    assert data.model_name == REF


def test_the_numbers_of_the_card_are_those_of_the_evaluations_of_this_model(exported: Exported) -> None:
    found = {(r.dataset_config, r.metric_name): r for r in exported.card.data.eval_results}
    clean, corrupted = (exported.evaluation(stage) for stage in ("evaluate", "evaluate-corrupted"))
    settings = 'corrupted kinds=["fog", "contrast"] severities=[1]'
    expected = {
        ("clean", "top-1"): clean.metrics["test"]["top1"],
        ("clean", "calibration error"): clean.metrics["test"]["ece"],
        (settings, "error, all corruptions"): corrupted.metrics["mean_error"],
        (settings, "fog"): corrupted.metrics["mean_errors"]["fog"],
        (settings, "contrast"): corrupted.metrics["mean_errors"]["contrast"],
    }
    assert {place: result.metric_value for place, result in found.items()} == expected
    assert {result.dataset_revision for result in found.values()} == {exported.model.inputs["data"]}
    assert {result.dataset_name for result in found.values()} == {"digits/prepare"}
    for (_, name), value in expected.items():
        assert f"| {name}, % | {100 * value:.2f} |" in exported.card.text


def test_the_card_names_data_teacher_and_selection_with_keys_and_counts(exported: Exported) -> None:
    text, store = exported.card.text, exported.store
    for kind, name in (("dataset", "prepare"), ("dataset", "unlabeled"), ("model", "0/teacher"), ("labels", "1/label")):
        key = resolve_ref(store, f"digits/{name}").key
        assert get(store, kind, key).key == key
        assert f"`{key}`" in text
        assert f"digits/{name}" in text
    counts = get(store, "selection", exported.model.inputs["selection"]).metrics
    kept = counts["per_class"]["kept"]
    assert f"{counts['kept']:,} kept, {counts['dropped']:,} dropped, {counts['duplicated']:,} copies" in text
    assert f"Fewest kept: {min(kept):,} of class {kept.index(min(kept))}" in text
    assert (" none." in text) is (0 in kept)
    assert "| seed | 0 |" in text
    assert "recipe digits" in text
    assert f"{exported.model.metrics['num_steps']} steps" in text


def test_every_table_of_the_card_is_whole(exported: Exported) -> None:
    lines = exported.card.text.splitlines()
    rows = [n for n, line in enumerate(lines) if line.startswith("|")]
    assert len(rows) > 10
    for number in rows:
        if lines[number - 1].startswith("|"):
            assert cells(lines[number]) == cells(lines[number - 1]), lines[number]
        else:
            assert lines[number - 1] == "", "a table begins after an empty line"
            assert set(lines[number + 1]) <= set("|:- "), lines[number + 1]


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line))


def test_the_card_tells_nothing_of_the_machine(exported: Exported) -> None:
    content = str(exported.card)
    assert str(exported.place) not in content
    assert socket.gethostname() not in re.findall(r"\w+", content)


def code_of(card: ModelCard, folder: Path) -> str:
    """The card's own words on how to use the model, with its folder and an image."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    image = "from PIL import Image\nimage = Image.new('RGB', (40, 30), (9, 99, 200))\n"
    return (
        f"{image}{code.replace('FOLDER', str(folder))}\nprint(tuple(probabilities.shape), float(probabilities.sum()))"
    )


def printed_by(code: str, folder: Path) -> str:
    """What a program prints that knows nothing of this project's folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cards_code_loads_the_model_with_timm_alone(exported: Exported, tmp_path: Path) -> None:
    shape, total = printed_by(code_of(exported.card, exported.folder), tmp_path).strip().rsplit(" ", 1)
    assert shape.endswith("(1, 10)")
    assert float(total) == pytest.approx(1, abs=1e-5)
    assert not (exported.folder / "variants.py").exists()


def unrecorded(store: Store) -> Manifest:
    """A network of ours, of which no record tells how it was trained."""
    config = ModelConfig(name="wide_resnet28_2", args={"layers": [1, 1, 1], "channels": [8, 8, 16]}, image_size=32)
    return commit_model(store, zoo.build(config, len(HOSTILE)), config, "ours", HOSTILE)


def exported_card(store: Store, model: Manifest, folder: Path) -> ModelCard:
    """The card in `folder/model`, of a model that has a ref of its own."""
    set_ref(store, "own/0/teacher", "model", model.key)
    nst("export", "own/0/teacher", "model", "--store", store.url, cwd=folder)
    return ModelCard.load(folder / "model/README.md")


def test_a_network_that_timm_lacks_takes_its_definition_along(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    plain = unrecorded(store)
    network = ModelConfig(name="wide_resnet28_2", image_size=32)
    config = TrainConfig(
        model=network, epochs=1, labeled_batch=8, pretrained="local-dir:/home/somebody/weights"
    ).key_fields()
    metrics = {**plain.metrics, "num_steps": 3, "num_parameters": 7, "val_top1": 0.5}
    facts = {"key": digest("trained"), "stage": "train", "config": config, "metrics": metrics}
    card = exported_card(store, commit(store, plain.model_copy(update=facts)), tmp_path)
    assert "(1, 3)" in printed_by(code_of(card, tmp_path / "model"), tmp_path)
    assert "/home/somebody" not in str(card)


def test_a_model_without_records_has_a_card_that_says_so_and_invents_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    card = exported_card(store, unrecorded(store), tmp_path)
    assert card.data.eval_results is None
    assert card.data.datasets is None
    for said in ("The store has no evaluation of this model", "No record tells how the weights were trained"):
        assert said in card.text


def test_class_names_are_shown_as_text_whatever_is_in_them(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    text = exported_card(store, unrecorded(store), tmp_path).text
    assert "<script>" not in text
    assert r"a\|b, &lt;script&gt;, \`x\` \*y\* \[z\](w)." in text
