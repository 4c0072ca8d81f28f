"""Stores of many small artifacts with the numbers that real ones have and no files: for tests and the benchmark of lineage."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from storage.artifacts import Manifest, manifest_path
from storage.keys import digest
from storage.objects import Store
from storage.runs import NodeRecord, Ref, RunRecord
from storage.seals import sealed

CLASSES = tuple(f"class {n}" for n in range(10))
SPLITS = ("labeled", "val", "test")


@dataclass
class Builder:
    """Makes manifests of experiments one after the other; `stages`: experiment -> stage name -> manifest."""

    seed: int = 0
    stages: dict[str, dict[str, Manifest]] = field(default_factory=dict)
    minutes: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def add(self, experiment: str, name: str, inputs: dict[str, str], **config: Any) -> Manifest:
        """An artifact of a stage; inputs are role -> stage name, or a fingerprint after `=`."""
        made = self.stages.setdefault(experiment, {})
        role = name.rpartition("/")[2]
        kind, stage = KINDS[role]
        keys = {role: at.removeprefix("=") if at.startswith("=") else made[at].key for role, at in inputs.items()}
        self.minutes += 1
        created = f"2026-{1 + self.minutes // 40320 % 12:02d}-{1 + self.minutes // 1440 % 28:02d}T{self.minutes // 60 % 24:02d}:{self.minutes % 60:02d}:00Z"
        made[name] = Manifest(
            kind=kind, key=digest([stage, config, keys]), stage=stage, stage_version=1, config=config, inputs=keys, files=(),
            metrics=self._metrics(kind, role),
            provenance={"created": created, "seconds": 60.0, "device": "cpu", "code": {"commit": f"{self.minutes // 50:07x}" + "a" * 33, "dirty": False}, "packages": {"torch": "2.11"}},
        )  # fmt: skip
        return made[name]

    def experiment(self, name: str, iterations: int = 3, share: str = "", **config: Any) -> dict[str, Manifest]:
        """All stages of an experiment, on the data sets of another one where `share` names it."""
        if share:
            self.stages[name] = {data: self.stages[share][data] for data in ("prepare", "unlabeled")}
        else:
            self.add(name, "prepare", {"source": f"={digest([name, 'labeled'])}"}, labeled="labeled.parquet")
            self.add(name, "unlabeled", {"data": "prepare", "source": f"={digest([name, 'crawl'])}"})
        self.add(name, "0/teacher", {"data": "prepare"}, epochs=50, seed=self.random.randrange(10**6), **config)
        self.add(name, "0/evaluate", {"data": "prepare", "model": "0/teacher"})
        model = "0/teacher"
        for n in range(1, iterations + 1):
            self.add(name, f"{n}/label", {"data": "unlabeled", "model": model})
            self.add(name, f"{n}/select", {"data": "unlabeled", "labels": f"{n}/label"}, min_confidence=0.3 + n / 100)
            model = f"{n}/student"
            self.add(name, model, {"data": "prepare", "selection": f"{n}/select"}, epochs=100 + n)
            self.add(name, f"{n}/evaluate", {"data": "prepare", "model": model})
        self.add(name, "report", {stage: stage for stage in list(self.stages[name])}, title=name)
        return self.stages[name]

    def _metrics(self, kind: str, role: str) -> dict[str, Any]:
        chance = self.random
        top1 = round(0.7 + 0.25 * chance.random(), 4)
        counts = [chance.randrange(0, 500) for _ in CLASSES]
        kept = [min(count, 300) for count in counts]
        total = sum(counts)
        splits = ("unlabeled",) if role == "unlabeled" else SPLITS
        numbers: dict[str, dict[str, Any]] = {
            "dataset": {split: {"images": 1000, "rejected": chance.randrange(5)} for split in splits},
            "model": {"val_top1": top1, "num_parameters": 11_173_962, "num_steps": 1000},
            "labels": {
                "images": total,
                "mean_confidence": top1,
                "confidence_histogram": [chance.randrange(1, 400) for _ in range(20)],
                "per_class": counts,
            },
            "selection": {
                **{"labeled": total, "kept": sum(kept), "dropped": total - sum(kept), "total": 300 * len(CLASSES)},
                "duplicated": 300 * len(CLASSES) - sum(kept),
                "per_class": {"available": counts, "kept": kept, "copies": [300] * len(CLASSES)},
            },
            "evaluation": {split: {"images": 1000, "top1": top1, "top5": 0.99} for split in ("val", "test")},
            "report": {},
        }
        return {"class_names": list(CLASSES), **numbers[kind]}


KINDS = {
    "prepare": ("dataset", "prepare"),
    "unlabeled": ("dataset", "unlabeled"),
    "teacher": ("model", "train"),
    "label": ("labels", "label"),
    "select": ("selection", "select"),
    "student": ("model", "train"),
    "evaluate": ("evaluation", "evaluate"),
    "report": ("report", "report"),
}


def experiments(num_artifacts: int, iterations: int = 3) -> Iterator[tuple[str, dict[str, Manifest]]]:
    """Experiments on shared data sets, until they have at least so many artifacts together."""
    builder, keys, number = Builder(), set[str](), 0
    while len(keys) < num_artifacts:
        name = f"birds-{number:04d}"
        stages = builder.experiment(name, iterations, share="birds-0000" if number else "")
        keys |= {manifest.key for manifest in stages.values()}
        number += 1
        yield name, stages


def publish(store: Store, name: str, stages: dict[str, Manifest]) -> None:
    """Write an experiment's manifests, its run record and refs into a store on disk. At once, not synced one by one."""
    records: dict[str, BaseModel] = {manifest_path(m.kind, m.key): m for m in stages.values()}
    nodes = tuple(
        NodeRecord(name=stage, stage=m.stage, kind=m.kind, key=m.key, version=1, config=m.config, inputs=m.inputs)
        for stage, m in stages.items()
    )
    records[f"runs/{name}/1.json"] = RunRecord(
        experiment=name, number=1, recipe="birds", config={"name": name}, sources={}, nodes=nodes
    )
    records |= {f"refs/{name}/{stage}/@1.json": Ref(kind=m.kind, key=m.key) for stage, m in stages.items()}
    for path, record in records.items():
        file = store.local_path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(sealed(record))
