"""Claims about the report's page, made from a small store that is built by hand: real PNGs in real tars.

Run: `PYTHONPATH=. .venv/bin/python -m pytest tests/tasks/test_report.py -q`
"""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.objects import Store
from storage.shards import ShardReader
from tasks import report as subject
from tasks import report_figures as figures
from tasks.report import spread, take_evenly
from tasks.report_evaluations import most_mistaken
from tasks.report_images import image_uri
from tests.tasks.report_runs import (
    HOSTILE,
    STUDENT_TOP1,
    TEACHER_TOP1,
    Page,
    RunBuilder,
    color,
    each_iteration,
    once,
    picture,
    png,
)


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
    # loss, validation, learning rate; confidence, balance; top-1, of both models calibration and confusion; classes
    assert len(dark) == 11
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
    heights = [picture(attributes["srcset"]).height for tag, attributes in page.elements if tag == "source"]
    assert max(heights) == figures.HEIGHT_IN * figures.DPI, "none has a row a class"


def measure(html: str, name: str) -> list[str]:
    """The cells of a measure's row in the tables of evaluations, its title first."""
    (row,) = re.findall(f'<tr data-measure="{re.escape(name)}">(.*?)</tr>', html)
    return re.findall("<td[^>]*>(.*?)</td>", row)


def test_each_models_calibration_and_mistakes_are_shown(html: str) -> None:
    text = " ".join(Page(re.sub("</t[dh]>", " ", html)).text.split())
    for name in ("0/teacher", "1/student"):
        for title in ("Is its confidence worth believing?", "Which classes are taken for which"):
            assert f"{name}: {title}" in text
        assert f"Most frequent mistakes of {name}" in text
    assert f"class taken for test images {HOSTILE[0]} {HOSTILE[2]} 6 {HOSTILE[2]} {HOSTILE[1]} 6" in text, "0/teacher"
    assert "12 of 40 test images are taken for another class" in text


def test_evaluations_of_a_kind_stand_beside_each_other_with_their_intervals(html: str) -> None:
    title, teacher, student = measure(html, "clean top-1")
    assert (title, teacher.split()[0], student.split()[0]) == ("top-1, %", "71.00", "79.25")
    low, high = teacher.split("(")[1].rstrip(")").split(" - ")
    assert float(low) < 71 < float(high)
    assert measure(html, "clean calibration error") == ["calibration error, %", "10.00", "10.00"]


def test_whatever_the_run_measured_is_shown_and_how_to_measure_more_is_said(tmp_path: Path) -> None:
    run = each_iteration(tmp_path)
    for name, error in (("0/teacher", 0.4), ("1/student", 0.3)):
        run.add_robustness(name, error)
    html = run.report()[1]
    assert measure(html, "corrupted fog") == ["fog, %", "40.00", "30.00"]
    assert measure(html, "corrupted error relative to 0/teacher (100)")[1:] == ["100.0", "77.5"]  # .3/.4 and .4/.5
    assert [cell.split()[0] for cell in measure(html, "fgsm top-1 at 4/255")[1:]] == ["10.00", "20.00"]
    assert "nst evaluate corrupted animals&lt;1&gt;/1/student" in html


def test_the_most_frequent_mistakes_come_first_and_right_images_are_none() -> None:
    counts = np.array([[9, 0, 2], [5, 1, 0], [0, 0, 7]])
    assert most_mistaken(["a", "b", "c"], counts) == [("b", "a", 5), ("a", "c", 2)]


def test_a_matrix_of_classes_is_darkest_where_every_image_goes() -> None:
    def accented(counts: np.ndarray) -> int:
        png = figures.confusion_matrix(figures.LIGHT, ["a", "b"], counts)
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        return int((pixels == (0x00, 0x72, 0xB2)).all(axis=-1).sum())

    assert accented(np.array([[3, 3], [4, 4]])) == 0
    both, one = accented(np.array([[5, 0], [0, 1]])), accented(np.array([[5, 0], [1, 1]]))
    assert both == pytest.approx(2 * one, rel=0.05)
    assert one > 1000


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
