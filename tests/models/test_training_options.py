"""What a recipe may ask of a training besides the plain one: where weights, labels and noise come from, and what is kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import zoo
from models.checkpoints import list_checkpoints, load_checkpoint
from models.compute import ComputeConfig
from models.configs import FinetuneConfig, LabelConfig, TrainConfig
from models.training import train
from models.worker import Stopped, Worker
from storage.artifacts import Manifest, agreed_numerics
from storage.errors import UserError
from tasks.label import label
from tests.datasets import HereEngine
from tests.models.artifacts import NUMERICS, Artifacts, commit_result, stage_context
from tests.models.training_runs import (
    CONFIG,
    STEPS,
    DisturbedWorker,
    changed,
    commit_trained,
    content,
    history,
    run,
    spec,
    weights,
)

PLAIN = {"crop": "none", "flip": False, "num_ops": 0}
FIXED = {"name": "sgd", "lr_per_256": 1e-12}  # a training that changes no weight, but batch norm's statistics


@pytest.fixture(scope="module")
def teacher(artifacts: Artifacts) -> Manifest:
    config = changed(epochs=10, optimizer={"name": "sgd", "lr_per_256": 1.6}, noise=PLAIN, ema_decay=0.5)
    return commit_trained(artifacts, run(artifacts, "a teacher", config, student=False), config, "a teacher")


def teacher_weights(artifacts: Artifacts, teacher: Manifest) -> dict[str, np.ndarray]:
    return weights(artifacts, {"files": [entry.model_dump() for entry in teacher.files]})


def trained(name: str) -> bool:
    return "running" not in name and "num_batches" not in name


def test_a_warm_start_begins_with_the_weights_of_the_teacher(artifacts: Artifacts, teacher: Manifest) -> None:
    config = changed(init="model", optimizer=FIXED, epochs=0.2)
    own, before = (
        weights(artifacts, run(artifacts, "warm", config, initial=teacher.key)),
        teacher_weights(artifacts, teacher),
    )
    assert [n for n in own if trained(n) and not np.allclose(own[n], before[n], atol=1e-6)] == []
    cold = weights(artifacts, run(artifacts, "cold", changed(optimizer=FIXED, epochs=0.2)))
    assert not np.allclose(cold["conv1.weight"], before["conv1.weight"], atol=1e-3)


def test_a_warm_start_from_another_network_is_refused(artifacts: Artifacts, teacher: Manifest) -> None:
    config = changed(init="model", model={"args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]}})
    with pytest.raises(UserError, match=r"init=model .* weights are of another network, \d+ tensors differ"):
        run(artifacts, "misfit", config, initial=teacher.key)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_fine_tuning_keeps_the_shallow_layers_and_their_statistics_fixed(
    artifacts: Artifacts, teacher: Manifest, share: float
) -> None:
    """ResNet-18 has six groups: stem, four stages, classifier."""
    first = changed(finetune=FinetuneConfig(epochs=1, image_size=32, frozen_layers=share, labeled_batch=16))
    config = first.finetuning()
    assert (config.model.image_size, config.labeled_batch, config.noise.num_ops) == (32, 16, 0)
    own = weights(artifacts, run(artifacts, f"finetuned {share}", config, student=False, initial=teacher.key))
    before = teacher_weights(artifacts, teacher)
    fixed = ("conv1", "bn1", "layer1", "layer2") + (("layer3",) if share == 0.8 else ())
    same = {name for name in own if np.array_equal(own[name], before[name])}
    assert {name for name in own if name.startswith(fixed)} <= same
    assert {name for name in own if name.startswith(("layer4", "fc")) and trained(name)}.isdisjoint(same)


def test_pretraining_on_pseudo_labels_sees_no_label(artifacts: Artifacts) -> None:
    config = changed(train_on="unlabeled")
    result = run(artifacts, "unlabeled", config)
    found = history(artifacts, result)
    assert set(found["loss_labeled"]) == {None}
    assert None not in found["loss_unlabeled"]
    smoothed = run(artifacts, "unlabeled, smoothed", changed(train_on="unlabeled", label_smoothing=0.3))
    assert content(smoothed)["model.safetensors"] == content(result)["model.safetensors"]


def test_an_online_teacher_gives_the_labels_that_it_would_have_stored(artifacts: Artifacts, teacher: Manifest) -> None:
    """Its softmax of the clean views, up to the half precision of stored labels."""
    config = changed(optimizer=FIXED, replicas=1, noise=PLAIN, model={"dropout": 0.0, "drop_path": 0.0}, record_steps=1)
    online = run(artifacts, "online", changed(config, pseudo_label_source="online"), teacher=teacher.key)
    context = stage_context(artifacts.store, "labels of a teacher", ComputeConfig(dtype="float32", compile="never"))
    predicted = label(
        dataclasses.replace(context, engine=HereEngine()), LabelConfig(), {"data": artifacts.data, "model": teacher}
    )
    labels = commit_result(artifacts.store, "labels", context.key, predicted, {"model": teacher.key})
    stored = run(artifacts, "stored", config, labels=labels.key)
    first, second = history(artifacts, online), history(artifacts, stored)
    np.testing.assert_allclose(first["loss_unlabeled"], second["loss_unlabeled"], atol=2e-3)
    assert first["agreement"] == second["agreement"]
    baked = history(artifacts, run(artifacts, "baked", config))
    assert np.abs(np.subtract(first["loss_unlabeled"], baked["loss_unlabeled"])).max() > 0.05


def test_an_online_teacher_resumes_bitwise(artifacts: Artifacts, teacher: Manifest) -> None:
    job = spec(artifacts, "online, stopped", changed(pseudo_label_source="online"), teacher=teacher.key)
    with pytest.raises(Stopped):
        train(job, DisturbedWorker(7))
    whole = run(artifacts, "online, whole", changed(pseudo_label_source="online"), teacher=teacher.key)
    assert content(train(job, Worker())) == content(whole)


def test_the_best_average_is_published_where_that_is_asked_also_after_a_resume(artifacts: Artifacts) -> None:
    """The learning rate is so high that the end is not the best."""
    wild = changed(optimizer={"name": "sgd", "lr_per_256": 24.0}, num_validations=STEPS, keep="best")
    result = run(artifacts, "best", wild)
    measured = history(artifacts, result)["val_top1"]
    assert result["metrics"]["val_top1"] == max(measured)
    assert result["metrics"]["best_step"] == 1 + measured.index(max(measured)) < STEPS
    last = run(artifacts, "last", changed(wild, keep="last"))
    assert content(last)["model.safetensors"] != content(result)["model.safetensors"]
    job = spec(artifacts, "best, stopped", wild)
    with pytest.raises(Stopped):
        train(job, DisturbedWorker(result["metrics"]["best_step"] + 1))
    assert content(train(job, Worker())) == content(result)


def test_a_diverged_network_is_never_a_checkpoint_and_the_last_good_one_is_named(artifacts: Artifacts) -> None:
    wild = changed(optimizer={"name": "sgd", "lr_per_256": 1e6})
    job = spec(artifacts, "diverging", wild, compute={"checkpoint_steps": 1, "kept_checkpoints": 10})
    with pytest.raises(
        UserError, match=r"not finite after step 3 of 18; its last good checkpoint is .*step-000000002-"
    ):
        train(job, Worker())
    paths = list_checkpoints(artifacts.store, job["key"])
    assert [path.split("/")[-1].split("-")[1] for path in paths] == ["000000002", "000000001"]
    state = load_checkpoint(artifacts.store, paths[0])
    assert state is not None
    assert all(torch.isfinite(t).all() for t in state["model"].values())


def test_a_training_that_is_stopped_after_it_diverged_keeps_no_checkpoint_of_it(artifacts: Artifacts) -> None:
    job = spec(artifacts, "diverged, stopped", changed(optimizer={"name": "sgd", "lr_per_256": 1e6}, record_steps=100))
    with pytest.raises(UserError, match="not finite at step 5"):
        train(job, DisturbedWorker(5))
    assert list_checkpoints(artifacts.store, job["key"]) == []


def test_as_many_checkpoints_are_kept_as_asked(artifacts: Artifacts) -> None:
    job = spec(artifacts, "three kept", compute={"checkpoint_steps": 2, "kept_checkpoints": 3})
    train(job, Worker())
    assert len(list_checkpoints(artifacts.store, job["key"])) == 3


def test_a_checkpoint_is_made_by_time_too_but_saving_takes_little_of_it(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = {"checkpoint_seconds": 1e-9, "kept_checkpoints": 100}
    monkeypatch.setattr("models.training.SHARE_OF_SAVING", 0)
    job = spec(artifacts, "by time", compute=often)
    train(job, Worker())
    assert len(list_checkpoints(artifacts.store, job["key"])) == STEPS - 1
    monkeypatch.setattr("models.training.SHARE_OF_SAVING", 1e9)
    job = spec(artifacts, "by time, but rarely", compute=often)
    train(job, Worker())
    assert len(list_checkpoints(artifacts.store, job["key"])) == 1


@pytest.mark.parametrize("steps", [0, 4])
def test_records_are_as_often_as_asked(artifacts: Artifacts, steps: int) -> None:
    found = history(artifacts, run(artifacts, f"records {steps}", changed(record_steps=steps, num_validations=1)))
    assert found["step"] == ([4, 8, 12, 16, 18] if steps else list(range(1, STEPS + 1)))


def test_half_precision_with_a_loss_scale_trains_and_resumes_bitwise(artifacts: Artifacts) -> None:
    numerics = {**NUMERICS, "dtype": "float16"}
    whole = run(artifacts, "half", numerics=numerics)
    job = spec(artifacts, "half, stopped", numerics=numerics)
    with pytest.raises(Stopped):
        train(job, DisturbedWorker(7))
    checkpoint = load_checkpoint(artifacts.store, list_checkpoints(artifacts.store, job["key"])[0])
    assert checkpoint is not None
    assert checkpoint["scaler"]["scale"] > 1
    assert content(train(job, Worker())) == content(whole)
    exact, half = weights(artifacts, run(artifacts, "exact")), weights(artifacts, whole)
    assert not np.array_equal(exact["fc.weight"], half["fc.weight"])


def test_a_short_training_takes_the_default_numerics_and_publishes_them(artifacts: Artifacts) -> None:
    job = spec(artifacts, "measured", numerics=None)
    result = train(job, Worker())
    assert agreed_numerics(artifacts.store, "model", job["key"]) == result["facts"]["numerics"] == NUMERICS
    assert content(result) == content(run(artifacts, "not measured"))


def test_a_pretrained_network_is_taken_as_it_is_or_trained_on(
    artifacts: Artifacts, teacher: Manifest, tmp_path: Path
) -> None:
    zoo.materialize(artifacts.store, teacher, tmp_path)
    source = f"local-dir:{tmp_path}"
    taken = run(artifacts, "taken", changed(pretrained=source, epochs=0), student=False)
    before = teacher_weights(artifacts, teacher)
    assert all(np.array_equal(tensor, before[name]) for name, tensor in weights(artifacts, taken).items())
    assert taken["metrics"]["val_top1"] == teacher.metrics["val_top1"]
    more = run(artifacts, "trained on", changed(pretrained=source, optimizer=FIXED, epochs=0.2), student=False)
    own = weights(artifacts, more)
    assert [n for n in own if trained(n) and not np.allclose(own[n], before[n], atol=1e-6)] == []


def test_pretrained_weights_that_do_not_fit_are_refused_by_name(
    artifacts: Artifacts, teacher: Manifest, tmp_path: Path
) -> None:
    zoo.materialize(artifacts.store, teacher, tmp_path)
    source = f"local-dir:{tmp_path}"

    def refusal(**fields: Any) -> str:
        with pytest.raises(UserError) as caught:
            run(artifacts, json.dumps(fields), changed(**{"pretrained": source, "epochs": 0, **fields}), student=False)
        return str(caught.value)

    assert "is a resnet18, model.name is resnet34; set model.name=resnet18" in refusal(model={"name": "resnet34"})
    assert "was trained with model.mean=[0.485, 0.456, 0.406], here it is [0.5" in refusal(
        model={"mean": (0.5, 0.5, 0.5)}
    )
    assert "has no model.safetensors and no config.json" in refusal(pretrained=f"local-dir:{tmp_path / 'nowhere'}")
    assert "name timm's weights with their tag" in refusal(pretrained="tf_efficientnet_b7")
    config = changed(pretrained=source, epochs=0)
    with pytest.raises(UserError, match="the weights have changed since the run began"):
        run(artifacts, "swapped", config, student=False, source="0" * 32)


def test_pretrained_weights_for_other_classes_get_a_new_classifier(artifacts: Artifacts, tmp_path: Path) -> None:
    torch.manual_seed(3)
    other = zoo.build(CONFIG.model, 7)
    zoo.save(other, CONFIG.model, list("abcdefg"), tmp_path)
    source = f"local-dir:{tmp_path}"
    own = weights(
        artifacts, run(artifacts, "new classes", changed(pretrained=source, optimizer=FIXED, epochs=0.2), student=False)
    )
    assert own["fc.weight"].shape[0] == 4
    assert np.allclose(own["layer3.0.conv1.weight"], other.state_dict()["layer3.0.conv1.weight"].numpy(), atol=1e-6)
    with pytest.raises(UserError, match="tells 7 classes apart, the data set has 4; set epochs"):
        run(artifacts, "as it is", changed(pretrained=source, epochs=0), student=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs=0 trains nothing"),
        ({"pretrained": "local-dir:x", "init": "model"}, "both say where the weights come from"),
        ({"frozen_layers": 0.5}, "would keep random weights"),
        ({"finetune": {"labeled_batch": 7}}, "labeled_batch=7 does not divide into replicas=2"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({**CONFIG.model_dump(), **fields})
