"""A study: its judgement held against numbers worked out by hand; a real tiny one runs, resumes and is shown again."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flows.studies import Grid, Study, load_study, make_grid
from flows.study_pages import markdown_page
from flows.study_runs import plan_study
from flows.study_table import Failure, Measurements, Row, judge, make_rows, summary
from storage.artifacts import find, list_artifacts
from storage.errors import UserError
from storage.objects import Store
from storage.runs import list_experiments, read_run
from tests.flows.runs import TINY, contents, nst, nst_in_one_process

TINY_STUDY = """\
name: tiny
title: Does it work?
paper: table 6
finding: Soft labels are better.
scales:
  tiny:
    about: Digits, hardly trained.
    recipe: digits
    seeds: 2
    seeded: [select.seed]
    reference: supervised
    variants:
      - {name: supervised, of: soft, network: 0/teacher, paper: 84.0}
      - {name: soft, title: soft labels, paper: 85.1}
      - {name: broken, paper: 80.0, overrides: {student.batch_ratio: 5000}}
      - {name: hard, title: hard labels, paper: 84.0, against: soft, overrides: {student.pseudo_labels: hard}}
"""


def tiny_study(folder: Path, old: str = "", new: str = "") -> str:
    """The path of the study `tiny.yaml`, a piece of its text replaced."""
    assert old in TINY_STUDY
    path = folder / "tiny.yaml"
    path.write_text(TINY_STUDY.replace(old, new) if old else TINY_STUDY)
    return str(path)


def grid_of(folder: Path, old: str = "", new: str = "", seeds: int = 2) -> Grid:
    return make_grid(load_study(tiny_study(folder, old, new)), "tiny", seeds)


# -------------------------------------------------------------------------------------------------------- the judgement


@pytest.mark.parametrize(
    ("expected", "differences", "verdict"),
    [
        ("higher", [2.0, 3.0, 4.0], "yes"),  # 3 > 4.303 x 0.577 = 2.48
        ("lower", [2.0, 3.0, 4.0], "no"),
        ("lower", [-2.0, -3.0, -4.0], "yes"),
        ("same", [2.0, 3.0, 4.0], "no"),
        ("higher", [1.0, 2.0, 3.0], "within error"),  # 2 < 2.48
        ("higher", [-1.0, -2.0, -3.0], "within error"),
        ("same", [1.0, 2.0, 3.0], "within error"),
        ("higher", [1.0, 1.5], "within error"),  # 1.25 < 12.706 x 0.25
        ("higher", [0.0, 0.0, 0.0], "within error"),
        ("higher", [5.0], "one seed"),
        ("higher", [], "not measured"),
        (None, [5.0, 5.1], ""),
    ],
)
def test_a_direction_is_judged_where_it_is_clear_of_chance(
    expected: Any, differences: list[float], verdict: str
) -> None:
    assert judge(expected, differences) == verdict


def measured(**values: list[float | None]) -> Measurements:
    """Results as `tasks/results.py` has them: top-1 of each seed, by owner and network (`soft__1__student`)."""
    records: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for name, numbers in values.items():
        owner, iteration, role = name.split("__")
        for seed, top1 in enumerate(numbers):
            record = {"iteration": int(iteration), "role": role, "key": f"{name}{seed}", "top1": top1, "val_top1": 0.5}
            records.setdefault((owner, seed), []).append(record)
    return Measurements(records)


def test_rows_have_mean_error_and_differences_by_seed(tmp_path: Path) -> None:
    """Three seeds: 80, 82, 84 against 70, 73, 76: means 82 and 73, differences 10, 9, 8: 9 +- 0.577."""
    found = measured(
        soft__0__teacher=[0.70, 0.73, 0.76], soft__1__student=[0.80, 0.82, 0.84], hard__1__student=[0.9, None, 0.7]
    )
    rows = {row.name: row for row in make_rows(grid_of(tmp_path, seeds=3), found)}
    soft = rows["soft"]
    assert (soft.against, soft.paper, soft.paper_direction) == ("supervised", 85.1, "higher")
    assert soft.paper_difference == pytest.approx(1.1)
    assert (soft.mean, soft.error) == (pytest.approx(82), pytest.approx(2 / 3**0.5))
    assert (soft.difference, soft.difference_error) == (pytest.approx(9), pytest.approx(1 / 3**0.5))
    assert soft.verdict == "yes"
    assert (rows["supervised"].mean, rows["supervised"].verdict) == (pytest.approx(73), "")
    hard = rows["hard"]
    assert hard.difference == pytest.approx((90 - 80 + 70 - 84) / 2), "only seeds that have both"
    assert (hard.paper_direction, hard.verdict) == ("lower", "within error")
    assert rows["broken"].verdict == "not measured"
    assert summary(list(rows.values())) == (
        "3 directions of the paper's: 1 reproduce, 0 do not, 1 are within error, 1 are not measured"
    )


def test_a_study_may_name_another_metric_of_the_results(tmp_path: Path) -> None:
    metric = 'metric: {field: corruptions.mce, title: "mCE, lower is better", factor: 1, digits: 1}\nscales:'
    grid = grid_of(tmp_path, "scales:", metric)
    record = {"iteration": 1, "role": "student", "key": "k", "top1": 0.5, "corruptions": {"mce": 28.3}}
    rows = {r.name: r for r in make_rows(grid, Measurements({("soft", 0): [record]}))}
    assert rows["soft"].values == (28.3, None)
    with pytest.raises(UserError, match=r"study tiny: no result has metric.field=corruptions.mce; results have .*top1"):
        make_rows(grid, measured(soft__1__student=[0.5]))


FGSM = "metric: {field: evaluations.fgsm.accuracy.2, title: FGSM, digits: 1}, "


def of_fgsm(text: str) -> str:
    """The tiny study with two rows under attack beside the others, of the same runs."""
    rows = [
        f"      - {{name: attacked-supervised, of: soft, {FGSM}network: 0/teacher}}",
        f"      - {{name: attacked, of: soft, {FGSM}against: attacked-supervised, direction: higher}}",
    ]
    return "\n".join(
        [
            text.rstrip().replace("    variants:", "    overrides: {evaluate.fgsm: {epsilons: [2]}}\n    variants:"),
            *rows,
            "",
        ]
    )


def attacked_grid(folder: Path) -> Grid:
    (folder / "tiny.yaml").write_text(of_fgsm(TINY_STUDY))
    return make_grid(load_study(str(folder / "tiny.yaml")), "tiny", 2)


def test_a_row_may_have_the_metric_of_an_evaluator_beside_rows_of_another(tmp_path: Path) -> None:
    grid = attacked_grid(tmp_path)
    records = [
        {"iteration": n, "role": role, "key": role, "top1": top1, "evaluations": {"fgsm": {"accuracy": {"2": fgsm}}}}
        for n, role, top1, fgsm in ((0, "teacher", 0.7, 0.2), (1, "student", 0.8, 0.3))
    ]
    rows = make_rows(grid, Measurements({("soft", seed): records for seed in (0, 1)}))
    attacked = {row.name: row for row in rows}["attacked"]
    assert (attacked.values, attacked.measure, attacked.against) == ((30.0, 30.0), "FGSM", "attacked-supervised")
    assert (attacked.difference, attacked.verdict) == (pytest.approx(10), "yes")
    page = markdown_page(grid, rows, [], "p.png", "nst study tiny")
    assert "| soft labels | test top-1, % | 85.1 | 80.00 ± 0.00 (n=2) |" in page
    assert "| attacked | FGSM | - | 30.0 ± 0.0 (n=2) | higher | +10.0 ± 0.0 | attacked-supervised | yes |" in page
    records[1]["evaluations"] = {"fgsm": {"acuracy": {"2": 0.3}}}
    with pytest.raises(
        UserError, match=r"no result has metric.field=evaluations.fgsm.accuracy.2; results have acuracy"
    ):
        make_rows(grid, Measurements({("soft", 0): records[1:]}))


def test_what_was_not_evaluated_yet_is_not_measured(tmp_path: Path) -> None:
    record = {"iteration": 1, "role": "student", "key": "k", "top1": 0.8, "evaluations": {}}
    rows = {row.name: row for row in make_rows(attacked_grid(tmp_path), Measurements({("soft", 0): [record]}))}
    assert (rows["attacked"].values, rows["attacked"].verdict) == ((None, None), "not measured")
    assert rows["soft"].mean == 80


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("student.pseudo_labels", "student.pseudo_label", r"study tiny, variant hard: .*did you mean student.pseudo_labels\?"),
        ("network: 0/teacher", "network: 7/student", r"variant supervised: network=7/student is not measured .*0/teacher, 1/stu"),
        ("against: soft", "against: sfot", r"variant hard: against=sfot is no other variant"),
        ("of: soft", "of: gone", r"variant supervised: of=gone is no other variant"),
        ("reference: supervised", "reference: nobody", r"reference=nobody is no variant; it has supervised, soft"),
        ("{name: soft,", "{name: hard,", r"variant hard stands twice"),
        ("student.pseudo_labels: hard", "select.seed: 3", r"hard sets select.seed, which the study sets; remove it"),
        ("of: soft,", "of: soft, overrides: {student.epochs: 1},", r"no recipe and no overrides"),
        ("recipe: digits", "recipe: digit", r"study tiny, variant soft: recipe 'digit' is no file in .* -> did you mean digits"),
        ("title: Does", "tilte: Does", r"tiny.yaml: unknown field tilte -> did you mean title\?"),
        ("name: tiny", "name: other", r"name=other is not the file's name"),
        ("title: hard labels,", f"title: hard labels, {FGSM}", r"variant hard: against=soft has another metric"),
        ("name: broken,", f"name: broken, {FGSM}", r"variant broken: metric.field=evaluations.fgsm.accuracy.2 is measured by fgsm, .*add evaluate.fgsm"),
        ("name: broken,", "name: broken, metric: {field: evaluations.fsgm.x},", r"there is no evaluator fsgm; there are clean, corrupted"),
        ("paper: 84.0, against: soft", "paper: 84.0, direction: lower", r"direction=lower is for rows of which the paper"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_study_names_study_variant_and_remedy(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid_of(tmp_path, old, new)


def test_what_is_asked_for_wrongly_ends_before_anything_is_touched(tmp_path: Path) -> None:
    study = load_study(tiny_study(tmp_path))
    with pytest.raises(UserError, match="no scale 'imagenet'; it offers tiny"):
        make_grid(study, "imagenet")
    with pytest.raises(UserError, match=r"study tiny sets select.seed itself"):
        make_grid(study, "tiny", 0, ["select.seed=4"])
    with pytest.raises(UserError, match="'nosie' is no file and no shipped study; shipped: balancing, batch-ratio"):
        load_study("nosie")
    store = tmp_path / "store"
    for arguments in (["student.epochs=1"], ["noise", "student.epoch=1"], ["noise", "--plan", "--show"]):
        assert "error:" in nst("study", *arguments, "--store", str(store), cwd=tmp_path, code=2)
    assert not store.exists()


# ------------------------------------------------------------------------------------------------------- a real tiny one


@pytest.fixture(scope="module")
def studied(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with tiny.yaml, its store and docs after the study has run, and what it printed as JSON.

    The store had an ordinary run of the same settings before.
    """
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(finished, folder / "store")
    tiny_study(folder)
    printed = nst(*command(folder, "--out", "docs", "--json"), cwd=folder, code=1)
    return folder, json.JSONDecoder().raw_decode(printed)[0]


def command(folder: Path, *options: str) -> list[str]:
    return [
        "study",
        str(folder / "tiny.yaml"),
        *TINY,
        "--scale",
        "tiny",
        "--store",
        str(folder / "store"),
        *options,
    ]


def test_a_failing_variant_does_not_stop_the_others_and_is_named(studied: tuple[Path, dict[str, Any]]) -> None:
    failures = studied[1]["failures"]
    assert [(f["variant"], f["seed"]) for f in failures] == [("broken", 0), ("broken", 1)]
    assert "batch_ratio=5000.0 asks for" in failures[0]["cause"]
    rows = {row["name"]: row for row in studied[1]["rows"]}
    assert [rows[name]["verdict"] for name in rows] == [
        "",
        rows["soft"]["verdict"],
        "not measured",
        rows["hard"]["verdict"],
    ]
    assert all(None not in rows[name]["values"] for name in ("supervised", "soft", "hard"))


def test_the_tables_numbers_are_the_evaluations(studied: tuple[Path, dict[str, Any]]) -> None:
    store = Store(str(studied[0] / "store"))
    places = {"supervised": ("soft", "0/evaluate"), "soft": ("soft", "1/evaluate"), "hard": ("hard", "1/evaluate")}
    for row in studied[1]["rows"]:
        if row["name"] == "broken":
            continue
        variant, node = places[row["name"]]
        for seed, value in enumerate(row["values"]):
            record = read_run(store, f"study-tiny-{variant}-seed{seed}").node(node)
            assert record is not None
            evaluation = find(store, "evaluation", record.key)
            assert evaluation is not None
            assert value == pytest.approx(100 * evaluation.metrics["test"]["top1"])
            assert evaluation.inputs["model"] == row["keys"][seed]


def test_common_artifacts_are_made_once(studied: tuple[Path, dict[str, Any]], finished: Path) -> None:
    """The ordinary run has soft's of seed 0; beside it three students with evaluations and one selection, no report."""
    store = Store(str(studied[0] / "store"))
    before, made = ([m.kind for m in list_artifacts(s)] for s in (Store(str(finished)), store))
    added = {kind: made.count(kind) - before.count(kind) for kind in set(made)}
    assert added == {
        "dataset": 0, "labels": 0, "report": 0, "selection": 1, "model": 3, "evaluation": 3,
    }  # fmt: skip
    assert len(list_experiments(store)) == 1 + 3 * 2
    grid = make_grid(load_study(str(studied[0] / "tiny.yaml")), "tiny", 2, TINY)
    plan = plan_study(grid, store)
    assert (plan.present, plan.distinct) == (len(made) - 1, len(made) - 1 + 2 * 2), (
        "all but the broken variant's students"
    )
    assert plan.missing == {"train": 2, "evaluate": 2}


def test_a_second_call_makes_nothing_again(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, first = studied
    before = contents(folder / "store")
    paths = Store(str(folder / "store")).paths("")
    printed = nst(*command(folder), cwd=folder, code=1)
    assert contents(folder / "store") == before
    assert Store(str(folder / "store")).paths("") == paths
    assert printed.count(": reused") == 2 * (8 + 7 + 2), "all stages of soft and hard, and the data sets of broken"
    assert "failed: broken, seed 1: " in printed
    assert f"{first['rows'][1]['mean']:.2f} ± {first['rows'][1]['error']:.2f}" in printed


def test_the_table_is_made_again_without_running(studied: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, first = studied
    out = ["--show", "--out", str(tmp_path), "--json"]
    lines = [
        command(folder, *out),
        command(folder, "--plan"),
        ["study"],
        ["study", "noise", "--scale", "imagenet", "--plan"],
    ]
    printed, heavy = nst_in_one_process(lines, tmp_path)
    assert heavy == []
    again, _ = json.JSONDecoder().raw_decode(printed)
    assert again["rows"] == [{**row, "notes": again["rows"][n]["notes"]} for n, row in enumerate(first["rows"])]
    assert again["failures"] == []
    page = (tmp_path / "tiny-tiny.md").read_text()
    assert "| soft labels | 85.1 |" in page
    assert "* broken: seed 0 is not finished" in page
    assert (tmp_path / "tiny-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "docs" / "tiny-tiny.md").read_text().count("* failed: broken, seed") == 2
    assert "6 runs of" in printed
    assert "GPU-days" in printed


def test_the_numbers_of_an_evaluator_are_those_of_its_artifacts(finished: Path, tmp_path: Path) -> None:
    """On the finished run's own networks: nothing is trained, and only the asked evaluation is made."""
    shutil.copytree(finished, tmp_path / "store")
    study = of_fgsm(TINY_STUDY).replace("seeds: 2", "seeds: 1")
    kept = [line for line in study.splitlines() if "name: broken" not in line and "name: hard" not in line]
    (tmp_path / "tiny.yaml").write_text("\n".join(kept))
    printed = nst(*command(tmp_path, "--json"), cwd=tmp_path)
    rows = {row["name"]: row for row in json.JSONDecoder().raw_decode(printed[printed.index("{") :])[0]["rows"]}
    store = Store(str(tmp_path / "store"))
    made = {m.inputs["model"]: m for m in list_artifacts(store, kind="evaluation") if m.stage == "evaluate-fgsm"}
    assert len(list_artifacts(store)) == len(list_artifacts(Store(str(finished)))) + len(made) == 9 + 2
    for name in ("attacked-supervised", "attacked"):
        (key,) = rows[name]["keys"]
        assert rows[name]["values"] == [pytest.approx(100 * made[key].metrics["accuracy"]["2"])]


def test_results_of_other_settings_are_not_shown(studied: tuple[Path, dict[str, Any]]) -> None:
    folder = studied[0]
    shown = nst(*command(folder, "--show", "--json", "select.min_confidence=0.3"), cwd=folder)
    rows = {row["name"]: row for row in json.loads(shown)["rows"]}
    assert rows["soft"]["values"] == [None, None]
    assert rows["soft"]["notes"] == ["seed 0 was run with other settings", "seed 1 was run with other settings"]


def test_a_page_says_what_failed_and_keeps_its_table_whole(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "title: soft labels", 'title: "soft | labels"')
    rows: list[Row] = make_rows(grid, measured(soft__0__teacher=[0.7, 0.7], soft__1__student=[0.8, 0.81]))
    page = markdown_page(grid, rows, [Failure("hard", 1, "no disk\nTraceback")], "p.png", "nst study tiny")
    assert "| soft \\| labels | 85.1 | 80.50 ± 0.50 (n=2) | +1.1 | +10.50 ± 0.50 | supervised | yes |" in page
    assert "* failed: hard, seed 1: no disk\n" in page


def test_a_study_is_typed_and_frozen(tmp_path: Path) -> None:
    study: Study = load_study(tiny_study(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        study.title = "else"  # type: ignore[misc]
