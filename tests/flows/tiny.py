"""A tiny experiment for tests that train nothing: its recipe, and a data set of small real images in Parquet."""

from pathlib import Path
from typing import Any

from flows.driver import Rerun, Run, resolve_run
from flows.experiment import load_experiment
from storage.artifacts import Manifest, commit
from storage.objects import Store
from storage.runs import record_run
from tests.real_images import write_splits

RECIPE = """\
name: tiny
data: {labeled: labeled.parquet, val: val.parquet, test: test.parquet, unlabeled: unlabeled*.parquet}
train:
  model: {name: resnet18, image_size: 32}
  labeled_batch: 32
  epochs: 20
teacher: {epochs: 50}
student: {batch_ratio: 4}
iterations: [{}, {}]
select: {images_per_class: 100}
scales:
  smoke: {teacher.epochs: 1, student.epochs: 2, iterations.2.batch_ratio: 1}
"""
FINGERPRINTS = {"prepare": "0123456789abcdef" * 2, "unlabeled": "fedcba9876543210" * 2}  # of data that need not exist


def write_recipe(folder: Path, text: str = RECIPE) -> str:
    """The path of the recipe `tiny.yaml`."""
    path = folder / "tiny.yaml"
    path.write_text(text)
    return str(path)


class Project:
    """A recipe, its images and a store in one folder."""

    def __init__(self, folder: Path) -> None:
        self.images = write_splits(folder / "images")
        self.recipe = write_recipe(folder)
        self.store = Store(str(folder / "store"))

    def overrides(self, *more: str) -> list[str]:
        return [f"data.root={self.images}", *more]

    def resolve(self, *overrides: str, rerun: str = "nothing") -> Run:
        """The run with these overrides, nothing written."""
        experiment = load_experiment(self.recipe, self.overrides(*overrides))
        return resolve_run(experiment, self.recipe, self.store, Rerun.parse(rerun))


def finish(run: Run, *names: str, **provenance: Any) -> Run:
    """Record the run, and commit an artifact without files for the named stages, or for all."""
    record_run(run.store, run.draft_record())
    for name in names or run.records:
        r = run.records[name]
        commit(
            run.store,
            Manifest(
                kind=r.kind,
                key=r.key,
                stage=r.stage,
                stage_version=r.version,
                config=r.config,
                inputs=r.inputs,
                files=(),
                metrics={"class_names": ["cat", "dog", "owl"], "labeled": {"images": 100}},
                provenance=provenance,
            ),
        )
    return run
