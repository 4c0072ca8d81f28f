"""A small made-up lineage: data -> teacher -> labels (of a part) -> student, with a run and refs."""

from typing import Any

from storage.artifacts import (
    FileEntry,
    Manifest,
    Part,
    artifact_folder,
    attempts_folder,
    commit,
    publish_file,
    publish_part,
)
from storage.objects import Store
from storage.runs import NodeRecord, RunRecord, record_run, set_ref

NUMERICS: dict[str, Any] = {"dtype": "float32"}


def publish(store: Store, kind: str, key: str, name: str, data: bytes) -> FileEntry:
    with store.staging() as folder:
        (folder / "file").write_bytes(data)
        return publish_file(store, artifact_folder(kind, key), name, folder / "file")


def make_artifact(store: Store, kind: str, key: str, inputs: dict[str, str], *more: FileEntry) -> Manifest:
    own = publish(store, kind, key, "a.bin", f"{kind} {key} ".encode() * 50)
    manifest = Manifest(
        kind=kind, key=key, stage=kind, stage_version=1, config={}, inputs=inputs, files=(own, *more), metrics={}
    )
    return commit(store, manifest)


def make_part(store: Store, key: str, data: bytes) -> Part:
    with store.staging() as folder:
        (folder / "rows").write_bytes(data)
        return publish_part(store, "predict", key, NUMERICS, {"rows.parquet": (folder / "rows", 3)})


def make_lineage(store: Store, tag: str = "") -> dict[str, Manifest]:
    """Four committed artifacts; `tag` makes their keys others."""
    part = make_part(store, f"part{tag}", f"rows {tag}".encode() * 9)
    data = make_artifact(store, "dataset", f"data{tag}", {"source": "outside"})
    teacher = make_artifact(store, "model", f"teacher{tag}", {"data": data.key})
    labels = make_artifact(store, "labels", f"labels{tag}", {"data": data.key, "model": teacher.key}, *part.files)
    student = make_artifact(store, "model", f"student{tag}", {"data": data.key, "labels": labels.key})
    return {"data": data, "teacher": teacher, "labels": labels, "student": student}


def make_run(store: Store, experiment: str, manifests: dict[str, Manifest]) -> RunRecord:
    """A run record and refs of some artifacts."""
    nodes = tuple(
        NodeRecord(name=name, stage=m.stage, kind=m.kind, key=m.key, version=1, config={}, inputs=m.inputs)
        for name, m in manifests.items()
    )
    draft = RunRecord(experiment=experiment, number=0, recipe="r", config={}, sources={}, nodes=nodes)
    record = record_run(store, draft)
    for name, manifest in manifests.items():
        set_ref(store, f"{experiment}/{name}", manifest.kind, manifest.key)
    return record


def make_checkpoint(store: Store, key: str, attempt: str) -> str:
    path = f"{attempts_folder('model', key)}/{attempt}/step-5.pt"
    store.create(path, b"weights")
    return path
