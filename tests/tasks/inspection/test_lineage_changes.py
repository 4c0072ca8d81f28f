from typing import Any

from storage.artifacts import Manifest
from tasks.inspection.lineage_changes import Change, differences, flat


def manifest(**fields: Any) -> Manifest:
    whole = {"kind": "model", "key": "k", "stage": "train", "stage_version": 1, "config": {}, "inputs": {}, "files": ()}
    return Manifest.model_validate(whole | fields)


def test_an_artifact_does_not_differ_from_itself() -> None:
    one = manifest(
        config={"epochs": 3}, metrics={"val_top1": 0.5}, provenance={"code": {"commit": "abc", "dirty": True}}
    )
    assert differences(one, one) == []


def test_changes_are_told_part_by_part_with_defaults_named() -> None:
    before = manifest(
        config={"epochs": 3, "model": {"name": "resnet18"}},
        inputs={"data": "d1"},
        metrics={"val_top1": 0.5, "per_class": [1, 2]},
        provenance={"code": {"commit": "0123456789", "dirty": False}, "packages": {"torch": "2.11"}, "device": "cpu"},
    )
    after = manifest(
        config={"model": {"name": "resnet18", "image_size": 64}},
        inputs={"data": "d2", "selection": "s"},
        metrics={"val_top1": 0.75, "per_class": [3, 4]},
        provenance={"code": {"commit": "0123456789", "dirty": True}, "packages": {"torch": "2.12"}, "device": "cuda"},
    )
    assert differences(before, after) == [
        Change("setting", "epochs", 3, "default"),
        Change("setting", "model.image_size", "default", 64),
        Change("input", "data", "d1", "d2"),
        Change("input", "selection", None, "s"),
        Change("number", "val_top1", 0.5, 0.75),
        Change("code", "commit", "0123456", "0123456+"),
        Change("package", "torch", "2.11", "2.12"),
        Change("machine", "device", "cpu", "cuda"),
    ]


def test_settings_have_dotted_names() -> None:
    assert flat({"a": {"b": {"c": 1}}, "d": [1], "e": {}}) == {"a.b.c": 1, "d": [1], "e": {}}
