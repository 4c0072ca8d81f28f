"""Runs for the tests of the report: their artifacts made by hand in a small store, real PNGs in real tars."""

import base64
import hashlib
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from models.compute import ComputeConfig, LocalEngine
from models.predictions import predictions_table
from storage.artifacts import FileEntry, Manifest, artifact_folder, commit, publish_file, publish_part
from storage.keys import digest
from storage.objects import Store
from storage.shards import INDEX_SCHEMA, ShardSample, index_name, write_parquet, write_tar
from tasks.contract import StageContext, StageResult
from tasks.report import ReportConfig, report
from tasks.select import make_plan
from tasks.selection.config import SelectConfig
from tasks.selection.decisions import read_decisions
from tasks.selection.scan import Predictions

HOSTILE = ("<script>alert(1)</script>", '"dog" & <b>$x^2$</b>', "鳥")
NUM_UNLABELED = 90
TEACHER_TOP1, STUDENT_TOP1 = 0.71, 0.7925


@dataclass
class RunBuilder:
    """Commits the artifacts of a run, one a stage name, as the stages would."""

    store: Store
    class_names: tuple[str, ...] = HOSTILE
    seconds: float = 1.0  # goes to the provenance, so it may not change the page
    inputs: dict[str, Manifest] = field(default_factory=dict)

    def add(
        self,
        name: str,
        kind: str,
        tables: dict[str, pa.Table],
        metrics: dict[str, Any],
        roles: dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
        entries: tuple[FileEntry, ...] = (),
    ) -> Manifest:
        sources = {role: self.inputs[stage].key for role, stage in (roles or {}).items()}
        key, files = digest([name, config, sources]), list(entries)
        with self.store.staging() as folder:
            for file, table in tables.items():
                write_parquet(folder / "table.parquet", table)
                files.append(
                    publish_file(self.store, artifact_folder(kind, key), file, folder / "table.parquet", len(table))
                )
        manifest = Manifest(
            kind=kind, key=key, stage=name.split("/")[-1], stage_version=1, config=config or {}, inputs=sources,
            files=tuple(files), metrics={"class_names": list(self.class_names), **metrics}, provenance={"seconds": self.seconds},
        )  # fmt: skip
        self.inputs[name] = commit(self.store, manifest)
        return manifest

    def add_data(self, num_shards: int = 3) -> None:
        """Image number n of the unlabeled ones is of the one color `color(n)`."""
        entries: list[FileEntry] = []
        for number in range(num_shards):
            numbers = list(range(NUM_UNLABELED))[number::num_shards]
            images = [png(color(n)) for n in numbers]
            with self.store.staging() as folder:
                samples = [ShardSample(image_key(n), {"png": data}) for n, data in zip(numbers, images, strict=True)]
                places = write_tar(folder / "shard.tar", samples)
                rows = [
                    (image_key(n), *place["png"], hashlib.sha256(data).hexdigest(), -1, 8, 8, 0, f'photos/"{n}".png')
                    for n, data, place in zip(numbers, images, places, strict=True)
                ]
                index = pa.Table.from_pylist(
                    [dict(zip(INDEX_SCHEMA.names, row, strict=True)) for row in rows], INDEX_SCHEMA
                )
                write_parquet(folder / "index.parquet", index)
                files = {name: (folder / name, len(rows)) for name in ("shard.tar", "index.parquet")}
                part = publish_part(self.store, "prepare", digest(["shard", number]), {}, files)  # type: ignore[arg-type]
            shard = part.file("shard.tar").model_copy(update={"name": f"shards/unlabeled/{number:05d}.tar"})
            entries += [shard, part.file("index.parquet").model_copy(update={"name": index_name(shard)})]
        counts = {split: {"images": 40, "rejected": 0} for split in ("labeled", "val", "test")}
        self.add("prepare", "dataset", {}, counts)
        own = {"unlabeled": {"images": NUM_UNLABELED, "rejected": 1234}}
        self.add("unlabeled", "dataset", {}, own, {"data": "prepare"}, entries=tuple(entries))

    def add_model(self, name: str, top1: float, top5: float | None = None, roles: dict[str, str] | None = None) -> None:
        """A model with its history, and its evaluation."""
        epochs = np.arange(1, 9) / 2
        history = {
            "step": np.arange(1.0, 9.0), "epoch": epochs, "learning_rate": 0.1 / epochs, "loss_labeled": 2 / epochs,
            "loss_unlabeled": 3 / epochs if roles else [None] * 8, "agreement": [None] * 8,
            "val_top1": [None, None, None, 0.5, None, None, None, 0.7],
        }  # fmt: skip
        schema = pa.schema([(column, pa.float64()) for column in history])
        self.add(
            name,
            "model",
            {"history.parquet": pa.table(history, schema)},
            {"val_top1": 0.7},
            {"data": "prepare", **(roles or {})},
        )
        if name.endswith("/selector"):
            return
        sizes = [20 * (n != 1) for n in range(len(self.class_names))]  # class 1 has no test image
        right = [round(size * top1) for size in sizes]
        rows = [
            {"split": split, "label": n, "class_name": c, "class_images": sizes[n], "class_correct": right[n]}
            for split in ("val", "test")
            for n, c in enumerate(self.class_names)
        ]
        pairs = [pair for n in range(len(sizes)) for pair in ((n, n, right[n]), (n, n - 1, sizes[n] - right[n]))]
        confused = [
            {"split": split, "label": n, "predicted": taken % len(sizes), "images": images}
            for split in ("val", "test")
            for n, taken, images in pairs
            if images
        ]
        bins = [
            {"split": "test", "low": 0.0, "high": 0.5, "images": 100, "confidence": 0.4, "accuracy": 0.5},
            {"split": "test", "low": 0.5, "high": 1.0, "images": 300, "confidence": 0.9, "accuracy": 0.8},
        ]
        tables = {"per_class.parquet": rows, "confusion.parquet": confused, "reliability.parquet": bins}
        shares = {"top1": top1, "top5": top5, "images": 400, "ece": 0.1, "mean_confidence": 0.775}
        self.add(
            f"{name.split('/')[0]}/evaluate",
            "evaluation",
            {file: pa.Table.from_pylist(own) for file, own in tables.items()},
            dict.fromkeys(("val", "test"), shares),
            {"data": "prepare", "model": name},
        )

    def add_robustness(self, name: str, error: float) -> None:
        """An evaluation under two corruptions, and one under attack; both by hand."""
        errors = {"fog": {"3": error}, "contrast": {"3": error + 0.1}}
        means = {kind: own["3"] for kind, own in errors.items()}
        mean = error + 0.05
        corrupted = {"images": 400, "errors": errors, "mean_errors": means, "mean_error": mean, "top1": 1 - mean}
        attacked = {"images": 400, "accuracy": {"0": 1 - error, "4": 0.5 - error}}
        for stage, metrics in (("evaluate-corrupted", corrupted), ("evaluate-fgsm", attacked)):
            roles = {"data": "prepare", "model": name}
            self.add(f"{name.split('/')[0]}/{stage}", "evaluation", {}, metrics, roles)

    def add_labels(self, iteration: int, model: str) -> None:
        rng, size = np.random.default_rng(iteration), len(self.class_names)
        probabilities = rng.dirichlet(np.linspace(0.3, 0.9, size), NUM_UNLABELED).astype(np.float32)
        table = predictions_table([image_key(n) for n in range(NUM_UNLABELED)], probabilities)
        counts, _ = np.histogram(table["confidence"].to_numpy(), 20, (0, 1))
        metrics = {
            "images": NUM_UNLABELED,
            "mean_confidence": float(table["confidence"].to_numpy().mean()),
            "confidence_histogram": counts.tolist(),
        }
        roles = {"data": "unlabeled", "model": model}
        self.add(f"{iteration}/label", "labels", {"predictions/unlabeled/00000.parquet": table}, metrics, roles)

    def add_selection(self, iteration: int, settings: dict[str, Any]) -> None:
        labels = self.inputs[f"{iteration}/label"]
        with self.store.staging() as folder:
            config = SelectConfig.model_validate(settings)
            files, metrics = make_plan(Predictions(self.store, labels, folder), config)
            names = ("decisions.parquet", "classes.parquet")
            tables = {name: pq.read_table(files[name][0]) for name in names}
        roles = {"data": "unlabeled", "labels": f"{iteration}/label"}
        self.add(f"{iteration}/select", "selection", tables, metrics, roles, settings)

    def decisions(self, iteration: int) -> list[dict[str, Any]]:
        """Of every image: key, label, confidence, decision, copies."""
        labels, selection = (self.inputs[f"{iteration}/{stage}"] for stage in ("label", "select"))
        return read_decisions(self.store, labels, selection).read_all().to_pylist()

    def report(self, grid_images: int = 12) -> tuple[StageResult, str]:
        """Run the stage; its result and the page."""
        context = StageContext(self.store, digest("report"), LocalEngine(ComputeConfig()), ComputeConfig())
        result = report(context, ReportConfig(experiment="animals<1>", grid_images=grid_images), self.inputs)
        return result, self.store.read_bytes(result.files[0].path).decode()


class Page(HTMLParser):
    """What a browser would see: every element with its attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tiles: dict[str, list[tuple[str, str]]] = {}  # fate -> (key, image as data URI)
        self.rows: dict[str, str] = {}  # ref -> the row's text
        self._fate, self._key, self._ref = "", "", ""
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        self._fate = found.get("data-fate", self._fate)
        self._key = found.get("data-key", self._key if tag == "img" else "")
        self._ref = found.get("data-ref", self._ref)
        if tag == "img" and self._key:
            self.tiles.setdefault(self._fate, []).append((self._key, found["src"]))

    def handle_endtag(self, tag: str) -> None:
        self._ref = "" if tag == "tr" else self._ref

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._ref:
            self.rows[self._ref] = self.rows.get(self._ref, "") + data + " "


def image_key(number: int) -> str:
    return f"photos-{number:08d}"


def color(number: int) -> tuple[int, int, int]:
    return (number, 255 - number, 7)


def png(rgb: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, rgb).save(stream, "PNG")
    return stream.getvalue()


def picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def each_iteration(folder: Path, min_confidence: float = 0.6, **settings: Any) -> RunBuilder:
    """A run of one iteration in the default order of work."""
    run = RunBuilder(Store(str(folder)), **settings)
    run.add_data()
    run.add_model("0/teacher", TEACHER_TOP1)
    run.add_labels(1, "0/teacher")
    run.add_selection(1, {"min_confidence": min_confidence, "images_per_class": 15, "on_empty_class": "skip"})
    run.add_model("1/student", STUDENT_TOP1, roles={"selection": "1/select"})
    return run


def once(folder: Path) -> RunBuilder:
    """A run in the paper's order: a selecting model, one selection, labels of each iteration's teacher."""
    run = RunBuilder(Store(str(folder)))
    run.add_data()
    run.add_model("0/teacher", TEACHER_TOP1, 0.9)
    run.add_model("0/selector", 0.5)
    run.add_labels(0, "0/selector")
    run.add_selection(0, {"images_per_class": 20})
    run.add_labels(1, "0/teacher")
    run.add_model("1/student", STUDENT_TOP1, 0.95, {"selection": "0/select", "labels": "1/label"})
    return run
