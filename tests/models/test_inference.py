"""Predictions depend on the shard, the network and the numerics alone: not on processes, groups or batches."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import timm.data
import torch
from PIL import Image

from models import zoo
from models.compute import ComputeConfig, LocalEngine
from models.configs import LabelConfig, ModelConfig
from models.inference import label_shards
from models.predictions import restore_probabilities
from models.worker import Stopped, Worker
from storage.artifacts import Manifest, Part, find_part
from storage.errors import StoreError
from storage.keys import digest
from storage.objects import Store
from storage.shards import read_table, shard_files
from tests.datasets import prepare_all
from tests.models.artifacts import CLASSES, NUMERICS, Artifacts, commit_model, commit_result, stage_context
from tests.real_images import SPLITS, write_images

CIFAR = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10-val.parquet"
NETWORK = ModelConfig(
    name="resnet18",
    args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    image_size=24,
    crop_pct=0.875,
    dropout=0.3,
    drop_path=0.2,
)


def network(num_classes: int) -> torch.nn.Module:
    """Random weights, sharpened so that predictions differ, with batch-norm statistics that are not a fresh one's."""
    torch.manual_seed(3)
    model = zoo.build(NETWORK, num_classes, bn_momentum=0.5).train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 3, 24, 24))
        model.get_classifier().weight.mul_(5)
    return model


@pytest.fixture(scope="module")
def model(artifacts: Artifacts) -> Manifest:
    return commit_model(artifacts.store, network(len(CLASSES)), NETWORK, "random")


def specs(
    artifacts: Artifacts,
    model: Manifest,
    name: str,
    groups: list[list[int]],
    batch: int = 16,
    unique: bool = False,
    config: LabelConfig | None = None,
    decoders: int = 0,
) -> list[dict[str, Any]]:
    """Specs of `label_shards` for these groups of shards; the parts' keys begin with `name`."""
    source, split = (artifacts.selection, "train") if unique else (artifacts.data, "unlabeled")
    names = [shard.name for shard in shard_files(source, split)]
    return [
        {
            "store": artifacts.store.url,
            "stage": "predict",
            "models": [model.key],
            "source": {"kind": source.kind, "key": source.key},
            "parts": [(split, names[number], digest([name, number])) for number in group],
            "numerics": {**NUMERICS, "batch": batch},
            "label": (config or LabelConfig()).model_dump(mode="json"),
            "unique": unique,
            "gpu": 0,
            "decoders": decoders,
        }
        for group in groups
    ]


def parts(artifacts: Artifacts, name: str, batch: int = 16) -> list[Part]:
    found = [
        find_part(artifacts.store, "predict", digest([name, number]), {**NUMERICS, "batch": batch})
        for number in range(3)
    ]
    return [part for part in found if part is not None]


def content(found: list[Part]) -> list[str]:
    return [entry.sha256 for part in found for entry in part.files]


def probabilities(artifacts: Artifacts, found: list[Part]) -> np.ndarray:
    tables = [read_table(artifacts.store, part.file("probabilities.parquet")) for part in found]
    return np.concatenate([restore_probabilities(table, len(CLASSES)) for table in tables]).astype(float)


def confidences(artifacts: Artifacts, found: list[Part]) -> np.ndarray:
    return np.concatenate(
        [read_table(artifacts.store, part.file("predictions.parquet"))["confidence"].to_numpy() for part in found]
    )


@pytest.fixture(scope="module")
def in_one(artifacts: Artifacts, model: Manifest) -> list[Part]:
    """All three shards in one piece of work, in this process."""
    label_shards(specs(artifacts, model, "one", [[0, 1, 2]])[0], Worker())
    return parts(artifacts, "one")


def test_every_image_gets_a_distribution_and_its_key(artifacts: Artifacts, in_one: list[Part]) -> None:
    assert [part.files[0].rows for part in in_one] == [24, 24, 24]
    assert probabilities(artifacts, in_one).sum(axis=1) == pytest.approx(np.ones(72), abs=2e-3)
    for part, shard in zip(in_one, shard_files(artifacts.data, "unlabeled"), strict=True):
        table = read_table(artifacts.store, part.file("predictions.parquet"))
        index = read_table(artifacts.store, artifacts.data.file(shard.name.replace("shards", "index")[:-3] + "parquet"))
        assert table["key"].to_pylist() == index["key"].to_pylist()
    assert len(np.unique(confidences(artifacts, in_one))) > 60, "the network says the same of every image"


def test_two_processes_with_other_groups_write_the_same_bytes(
    artifacts: Artifacts, model: Manifest, in_one: list[Part]
) -> None:
    progress: list[dict[str, Any]] = []
    work = specs(artifacts, model, "two", [[2], [0, 1]])
    LocalEngine(ComputeConfig(processes=2)).map("models.inference:label_shards", work, progress.append)
    assert content(parts(artifacts, "two")) == content(in_one)
    assert (progress[-1]["done"], progress[-1]["total"]) == (72, 72)


def test_shards_in_groups_of_their_own_give_the_same_bytes(
    artifacts: Artifacts, model: Manifest, in_one: list[Part]
) -> None:
    for work in specs(artifacts, model, "apart", [[1], [2], [0]]):
        label_shards(work, Worker())
    assert content(parts(artifacts, "apart")) == content(in_one)


def test_threads_that_decode_ahead_change_no_byte(artifacts: Artifacts, model: Manifest, in_one: list[Part]) -> None:
    """As a GPU has them; more of them than images of a batch."""
    for decoders in (1, 20):
        label_shards(specs(artifacts, model, f"{decoders} threads", [[0, 1, 2]], decoders=decoders)[0], Worker())
        assert content(parts(artifacts, f"{decoders} threads")) == content(in_one)


def test_a_finished_part_is_kept(
    artifacts: Artifacts, model: Manifest, in_one: list[Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time of a file would tell: the store keeps a file whose bytes it has, also of work that was done again."""
    monkeypatch.setattr("models.inference.Labeler", lambda *_: pytest.fail("a network was loaded again"))
    label_shards(specs(artifacts, model, "one", [[0, 1, 2]])[0], Worker())
    assert parts(artifacts, "one") == in_one


def test_a_worker_that_is_asked_to_stop_leaves_whole_parts_only(artifacts: Artifacts, model: Manifest) -> None:
    class StoppedAfterFirst(Worker):
        def progress(self, done: int, total: int, unit: str = "images", last: bool = False, **facts: Any) -> None:
            self.stop_requested = True

    work = specs(artifacts, model, "stopped", [[0, 1, 2]])[0]
    with pytest.raises(Stopped):
        label_shards(work, StoppedAfterFirst())
    assert len(parts(artifacts, "stopped")) == 1


@pytest.mark.parametrize("batch", [7, 64])
def test_padded_batches_of_any_size_agree(
    artifacts: Artifacts, model: Manifest, in_one: list[Part], batch: int
) -> None:
    """7 leaves a last batch of 3, 64 is larger than a shard."""
    name = f"batch {batch}"
    label_shards(specs(artifacts, model, name, [[0, 1, 2]], batch)[0], Worker())
    found = parts(artifacts, name, batch)
    assert np.abs(confidences(artifacts, found) - confidences(artifacts, in_one)).max() < 1e-5
    assert np.abs(probabilities(artifacts, found) - probabilities(artifacts, in_one)).max() < 1e-3  # stored as fp16


def test_copies_of_a_selection_are_labeled_once_under_their_source_key(
    artifacts: Artifacts, model: Manifest, in_one: list[Part]
) -> None:
    label_shards(specs(artifacts, model, "unique", [[0, 1, 2]], unique=True)[0], Worker())
    tables = [read_table(artifacts.store, part.file("predictions.parquet")) for part in parts(artifacts, "unique")]
    found = {k: c for t in tables for k, c in zip(t["key"].to_pylist(), t["confidence"].to_pylist(), strict=True)}
    assert sum(len(table) for table in tables) == len(found) == artifacts.selection.metrics["kept"]
    own = [read_table(artifacts.store, part.file("predictions.parquet")) for part in in_one]
    source = {k: c for t in own for k, c in zip(t["key"].to_pylist(), t["confidence"].to_pylist(), strict=True)}
    assert found == pytest.approx({key: source[key] for key in found}, abs=1e-5)


def test_outputs_that_are_not_finite_are_an_error_with_shard_and_key(artifacts: Artifacts, model: Manifest) -> None:
    """Of finite weights: the average of a training that went astray may overflow on some images only."""
    broken = network(len(CLASSES))
    with torch.no_grad():
        broken.get_classifier().weight.fill_(3e38)
        broken.get_classifier().bias.fill_(-3e38)
    manifest = commit_overflowing(artifacts.store, broken, "overflowing")
    shard = shard_files(artifacts.data, "unlabeled")[1]
    index = read_table(artifacts.store, artifacts.data.file("index/unlabeled/00001.parquet"))
    with pytest.raises(StoreError, match="not finite") as refusal:
        label_shards(specs(artifacts, manifest, "broken", [[1]])[0], Worker())
    assert shard.path in str(refusal.value)
    assert index["key"][0].as_py() in str(refusal.value)
    assert parts(artifacts, "broken") == []


def test_an_infinite_logit_that_softmax_hides_is_an_error(artifacts: Artifacts, model: Manifest) -> None:
    """-Inf for one class leaves probabilities that look like any others."""
    broken = network(len(CLASSES))
    with torch.no_grad():
        broken.get_classifier().weight[0].fill_(-3e38)
        broken.get_classifier().bias[0].fill_(-3e38)
    manifest = commit_overflowing(artifacts.store, broken, "one class")
    with pytest.raises(StoreError, match="not finite"):
        label_shards(specs(artifacts, manifest, "one class", [[1]])[0], Worker())


def commit_overflowing(store: Store, model: torch.nn.Module, name: str) -> Manifest:
    """`zoo.save` refuses such a network, so its files are written as an older version or another program might."""
    import safetensors.torch

    from storage.artifacts import artifact_folder, publish_file
    from tasks.contract import StageResult

    key, files = digest(name), []
    with store.staging() as folder:
        zoo.save(network(len(CLASSES)), NETWORK, list(CLASSES), folder)
        safetensors.torch.save_file(model.state_dict(), str(folder / zoo.WEIGHTS_FILE))
        for name in (zoo.WEIGHTS_FILE, zoo.CONFIG_FILE):
            files.append(publish_file(store, artifact_folder("model", key), name, folder / name))
    return commit_result(store, "model", key, StageResult(tuple(files), {"class_names": list(CLASSES)}), {})


def test_damaged_weights_are_refused(artifacts: Artifacts) -> None:
    manifest = commit_model(artifacts.store, network(len(CLASSES)), NETWORK, "damaged")
    local = artifacts.store.local_path(manifest.file(zoo.WEIGHTS_FILE).path)
    data = bytearray(local.read_bytes())
    data[-1] ^= 1
    local.unlink()
    local.write_bytes(data)
    with pytest.raises(StoreError, match=f"{local.name} is damaged"):
        label_shards(specs(artifacts, manifest, "damaged", [[0]])[0], Worker())


@pytest.mark.skipif(not CIFAR.is_file(), reason=f"{CIFAR} is not there: real JPEGs of the development data")
def test_labels_are_those_of_timms_own_evaluation_of_real_jpegs(tmp_path: Path) -> None:
    jpegs = [value["bytes"] for value in pq.ParquetFile(CIFAR).read_row_group(0)["image"][:40].to_pylist()]
    assert all(data[:2] == b"\xff\xd8" for data in jpegs)
    names = [str(number) for number in range(4)]
    for split in SPLITS:
        labels = None if split == "unlabeled" else [number % 4 for number in range(8)]
        write_images(tmp_path / f"{split}.parquet", jpegs[: len(labels)] if labels else jpegs, labels, names)
    store = Store(str(tmp_path / "store"))
    context = stage_context(store, "dataset")
    result = prepare_all(context, tmp_path, leaks={"enabled": False})
    data = commit_result(store, "dataset", context.key, result, {})
    own = Artifacts(store, data, data, data)
    model = commit_model(store, network(4), NETWORK, "random")
    label_shards(specs(own, model, "jpeg", [[0]])[0], Worker())
    part = find_part(store, "predict", digest(["jpeg", 0]), NUMERICS)
    assert part is not None
    table = read_table(store, part.file("predictions.parquet"))

    zoo.materialize(store, model, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=plain), is_training=False)
    with torch.inference_mode():
        inputs = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in jpegs])
        expected = plain(inputs).softmax(dim=-1).numpy()
    assert table["label"].to_pylist() == expected.argmax(axis=1).tolist()
    assert np.abs(table["confidence"].to_numpy() - expected.max(axis=1)).max() < 5e-3, "pixels may differ by 2 of 255"
