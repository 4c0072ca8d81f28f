"""Claims about the report's page, made from a small store that is built by hand: real PNGs in real tars.

Run: `PYTHONPATH=. .venv/bin/python -m pytest tests/tasks/test_report.py -q`
"""

import base64
import hashlib
import io
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.compute import ComputeConfig, LocalEngine
from models.predictions import predictions_table
from storage.artifacts import FileEntry, Manifest, artifact_folder, commit, publish_file, publish_part
from storage.keys import digest
from storage.objects import Store
from storage.shards import INDEX_SCHEMA, ShardReader, ShardSample, index_name, write_parquet, write_tar
from tasks import report as subject
from tasks import report_figures as figures
from tasks.contract import StageContext, StageResult
from tasks.report import ReportConfig, report, spread, take_evenly
from tasks.report_images import image_uri
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
        rows = [
            {
                "split": split,
                "label": n,
                "class_name": c,
                "class_images": 20 * (n != 1),
                "class_correct": round(20 * top1) * (n != 1),
            }
            for split in ("val", "test")
            for n, c in enumerate(self.class_names)
        ]  # class 1 has no test image
        measured = {split: {"top1": top1, "top5": top5, "images": 400} for split in ("val", "test")}
        evaluate = f"{name.split('/')[0]}/evaluate"
        self.add(
            evaluate,
            "evaluation",
            {"per_class.parquet": pa.Table.from_pylist(rows)},
            measured,
            {"data": "prepare", "model": name},
        )

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
            decisions = pq.read_table(files["decisions.parquet"][0])
        roles = {"data": "unlabeled", "labels": f"{iteration}/label"}
        self.add(f"{iteration}/select", "selection", {"decisions.parquet": decisions}, metrics, roles, settings)

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunBuilder:
    return each_iteration(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def html(run: RunBuilder) -> str:
    return run.report()[1]


def test_page_has_a_row_of_every_model_with_its_top1_and_gain(run: RunBuilder, html: str) -> None:
    rows = Page(html).rows
    assert list(rows) == ["animals<1>/0/teacher", "animals<1>/1/student"]
    assert "71.00" in rows["animals<1>/0/teacher"].split()
    chosen = run.inputs["1/select"].metrics
    expected = ["79.25", "+8.25", *(str(chosen[name]) for name in ("kept", "dropped", "duplicated"))]
    assert rows["animals<1>/1/student"].split()[-5:] == expected
    assert chosen["kept"]
    assert chosen["dropped"]
    assert chosen["duplicated"]


def test_metrics_of_the_artifact_are_the_table_of_the_run(run: RunBuilder) -> None:
    models = run.report()[0].metrics["models"]
    assert [(model["role"], model["top1"]) for model in models] == [
        ("teacher", TEACHER_TOP1),
        ("student", STUDENT_TOP1),
    ]


def test_page_loads_nothing_from_elsewhere(html: str) -> None:
    for tag, attributes in Page(html).elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:image/").startswith(
                ("data:image/png;base64,", "data:image/jpeg;base64,", "data:image/")
            )
        assert attributes.get("href", "#").startswith("#")
        assert "style" not in attributes
    assert "http" not in html
    assert "url(" not in html
    assert "@import" not in html


def test_links_within_the_page_have_targets(html: str) -> None:
    elements = Page(html).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["href"][1:] for _, a in elements if "href" in a} <= set(ids)


def test_same_inputs_make_the_same_bytes_in_another_store_at_another_time(tmp_path: Path, html: str) -> None:
    assert each_iteration(tmp_path, seconds=99.0).report()[1] == html
    assert str(tmp_path) not in html


def test_every_figure_has_a_text_alternative_and_both_themes(html: str) -> None:
    elements = Page(html).elements
    images = [attributes for tag, attributes in elements if tag == "img"]
    assert all(len(attributes["alt"]) > 3 for attributes in images)
    dark = [attributes["srcset"] for tag, attributes in elements if tag == "source"]
    assert len(dark) == 6  # loss, validation, learning rate; confidence, balance; classes
    for uri in dark:
        assert picture(uri).width == 798


@pytest.mark.parametrize("fate", ["kept", "dropped"])
def test_grids_show_the_images_of_that_fate_and_no_others(run: RunBuilder, html: str, fate: str) -> None:
    decisions = run.decisions(1)
    allowed = {row["key"] for row in decisions if (row["decision"] == "kept") == (fate == "kept")}
    tiles = Page(html).tiles[fate]
    keys = [key for key, _ in tiles]
    assert len(set(keys)) == 12
    assert set(keys) <= allowed
    for key, uri in tiles:
        assert picture(uri).getpixel((3, 3)) == color(int(key.split("-")[1]))


def test_kept_images_are_spread_over_classes_and_confidence(run: RunBuilder, html: str) -> None:
    decisions = {row["key"]: row for row in run.decisions(1)}
    shown = [decisions[key] for key, _ in Page(html).tiles["kept"]]
    assert [[row["label"] for row in shown].count(c) for c in range(3)] == [4, 4, 4]
    for number in range(3):
        kept = [row["confidence"] for row in decisions.values() if row["label"] == number and row["decision"] == "kept"]
        own = [row["confidence"] for row in shown if row["label"] == number]
        assert max(own) - min(own) > 0.6 * (max(kept) - min(kept))


def test_dropped_images_are_spread_over_confidence_and_name_the_cap(run: RunBuilder, html: str) -> None:
    decisions = {row["key"]: row for row in run.decisions(1)}
    shown = [decisions[key] for key, _ in Page(html).tiles["dropped"]]
    dropped = [row["confidence"] for row in decisions.values() if row["decision"] != "kept"]
    confidence = [row["confidence"] for row in shown]
    assert max(confidence) - min(confidence) > 0.7 * (max(dropped) - min(dropped))
    over_cap = sum(row["decision"] == "over_cap" for row in shown)
    assert html.count("over the cap") == over_cap > 0


def test_only_the_bytes_of_shown_images_are_read(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda *arguments: reads.append(arguments) or original(*arguments))
    run.report(grid_images=4)
    assert len(reads) == 8


def test_class_names_and_sources_with_html_are_shown_as_text(html: str) -> None:
    page = Page(html)
    assert "<script" not in html
    assert "<b>$x" not in html
    assert HOSTILE[0] in page.text
    assert HOSTILE[1] in page.text
    titles = [attributes["title"] for tag, attributes in page.elements if "data-key" in attributes]
    assert all(title.startswith('photos/"') and title.endswith('".png') for title in titles)
    assert all(
        set(attributes) <= {"class", "data-key", "data-decision", "title"}
        for tag, attributes in page.elements
        if tag == "figure"
    )


def test_settings_left_at_their_default_are_shown_with_their_value(tmp_path: Path) -> None:
    page = Page(once(tmp_path).report()[1])
    assert "at confidence 0.3 or more" in " ".join(page.text.split())


def test_in_the_papers_order_the_selection_is_shown_once(tmp_path: Path) -> None:
    _, html = once(tmp_path).report()
    page, text = Page(html), " ".join(Page(html).text.split())
    headings = [attributes["id"] for tag, attributes in page.elements if tag == "h2"]
    assert [h for h in headings if h.startswith("iteration")] == ["iteration-0", "iteration-1"]
    assert "0/selector labeled 90 images" in text
    assert "0/teacher labeled 90 images: those that had been selected, anew" in text
    assert html.count('data-fate="kept"') == 1
    assert "95.00" in page.rows["animals<1>/1/student"]  # top-5, as it was measured
    assert "0/selector" not in " ".join(page.rows)


def test_top5_has_no_column_where_no_model_has_it(html: str) -> None:
    assert "top-5" not in html


def test_teacher_alone_makes_a_page(tmp_path: Path) -> None:
    run = RunBuilder(Store(str(tmp_path)))
    run.add_data()
    run.add_model("0/teacher", TEACHER_TOP1)
    assert list(Page(run.report()[1]).rows) == ["animals<1>/0/teacher"]


def test_many_classes_are_drawn_as_curves_and_listed_by_gain(tmp_path: Path) -> None:
    run = each_iteration(tmp_path, min_confidence=0.1, class_names=tuple(f"class {n}" for n in range(60)))
    page = Page(run.report()[1])
    assert "The classes with the largest gains and losses" in page.text
    assert len({image.height for image in (picture(a["srcset"]) for t, a in page.elements if t == "source")}) == 1


def test_rejected_images_are_counted(html: str) -> None:
    assert "unlabeled 90 1,234" in " ".join(Page(html.replace("</td>", " </td>")).text.split())


def test_lineage_names_every_artifact_and_its_inputs(run: RunBuilder, html: str) -> None:
    text = " ".join(Page(html).text.split())
    for name, manifest in run.inputs.items():
        assert f"{name} · {manifest.kind} {manifest.key[:12]}" in text
    student = run.inputs["1/student"]
    assert f"selection → 1/select {student.inputs['selection'][:12]}" in text


def test_large_images_are_shrunk_and_small_ones_kept_exactly() -> None:
    uri, side = image_uri(png((9, 8, 7), (1000, 500)))
    assert uri.startswith("data:image/jpeg;base64,")
    assert picture(uri).size == (160, 80)
    assert side == 160
    uri, side = image_uri(png((9, 8, 7), (28, 20)))
    assert uri.startswith("data:image/png;base64,")
    assert picture(uri).getpixel((0, 0)) == (9, 8, 7)
    assert side == 28


@pytest.mark.parametrize("num_records", [1, 2, 7, 30])
def test_history_of_any_length_is_drawn_with_a_mean_of_neighbors(num_records: int) -> None:
    column = np.arange(float(num_records))
    mean = figures._running_mean(column)
    assert len(mean) == num_records
    assert mean[num_records // 2] == pytest.approx(column[max(0, num_records // 2 - 3) : num_records // 2 + 4].mean())
    history = {"epoch": column, "loss_labeled": column, "loss_unlabeled": column * np.nan}
    assert figures.loss_curves(figures.LIGHT, {"0/teacher": history}).startswith(b"\x89PNG")


def test_spread_begins_with_the_ends_and_the_middle() -> None:
    assert spread([0, 1, 2, 3, 4]) == [4, 0, 2, 3, 1]
    assert spread([]) == []
    assert spread([1]) == [1]


def test_take_evenly_fills_up_from_the_longer_queues() -> None:
    assert take_evenly([[1, 2, 3], [4], []], 3) == [1, 4, 2]
    assert take_evenly([[1], [2]], 5) == [1, 2]


def test_importing_the_stage_loads_no_heavy_library() -> None:
    code = "import sys, tasks.report; print([m for m in ('torch', 'prefect', 'matplotlib', 'jinja2', 'duckdb') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(subject.__file__).parents[1]
    )
    assert done.stdout.strip() == "[]"
