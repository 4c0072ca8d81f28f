"""What people do with runs: again, rerun a stage, both orders of work, two at once, under a real Prefect server."""

import json
import re
import sys
from pathlib import Path

from storage.artifacts import get, list_artifacts
from storage.objects import Store
from storage.runs import latest_run, resolve_ref
from storage.shards import read_index
from tests.flows.prefect_servers import post
from tests.flows.runs import TINY, command, contents, run, start


def nst(*arguments: str) -> str:
    return run([sys.executable, "-m", "flows.cli", *arguments])


def test_a_finished_run_reuses_every_artifact_and_changes_nothing(finished: Path) -> None:
    before = Store(str(finished)).paths("")
    output = run(command(finished))
    assert output.count(": reused") == 9, output
    assert Store(str(finished)).paths("") == before


def test_results_gives_one_record_a_model(finished: Path) -> None:
    records = json.loads(nst("results", "digits", "--json", "--store", str(finished)))
    assert [(r["iteration"], r["role"], r["ref"]) for r in records] == [
        (0, "teacher", "digits/0/teacher"),
        (1, "student", "digits/1/student"),
    ]
    teacher, student = records
    assert teacher["kept"] is None
    unlabeled = 5000 - 60 - 100 - 200 + 50
    assert student["kept"] + student["dropped"] == unlabeled
    assert all(0 <= record["top1"] <= 1 for record in records)
    assert "digits/1/student" in nst("results", "digits/1", "--store", str(finished))


def test_rerun_select_makes_it_and_what_follows_anew_and_nothing_before(finished_copy: Path) -> None:
    output = run(command(finished_copy, "--rerun", "select"))
    for name in ("prepare", "0/teacher", "0/evaluate", "1/label"):
        assert f"{name}: reused" in output
    for name in ("1/select", "1/student", "1/evaluate", "report"):
        assert f"{name}: reused" not in output
    latest = latest_run(Store(str(finished_copy)), "digits")
    assert latest is not None
    assert (latest.number, latest.generations["1/select"], latest.generations["1/student"]) == (2, 1, 0)
    assert run(command(finished_copy)).count(": reused") == 9  # a plain run follows the newest generation
    store = Store(str(finished_copy))
    old, new = (get(store, "selection", resolve_ref(store, f"digits/1/select@{n}").key) for n in (1, 2))
    assert old.key != new.key
    assert [f.sha256 for f in old.files] == [f.sha256 for f in new.files]  # the same selection, made again


def test_once_selects_once_and_the_student_learns_from_the_teachers_own_labels(finished_copy: Path) -> None:
    output = run(command(finished_copy, "order=once"))
    assert "0/teacher: reused" in output
    store = Store(str(finished_copy))
    selection, labels, student = (
        get(store, kind, resolve_ref(store, f"digits/{name}").key)
        for kind, name in (("selection", "0/select"), ("labels", "1/label"), ("model", "1/student"))
    )
    assert student.inputs["selection"] == selection.key
    assert student.inputs["labels"] == labels.key
    assert labels.metrics["images"] == selection.metrics["kept"] < selection.metrics["total"]
    index = read_index(store, selection, "train", ["source_key", "copy"])
    assert len(set(index["source_key"].to_pylist())) == selection.metrics["kept"]


def test_two_runs_at_once_end_with_the_artifacts_of_one(finished: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    children = [start(command(store)) for _ in range(2)]
    outputs = [child.communicate(timeout=500)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert contents(store) == contents(finished)


def test_plan_names_the_changed_field_and_does_nothing(finished: Path) -> None:
    before = Store(str(finished)).paths("")
    overrides = [*TINY, "select.min_confidence=0.2"]
    rows = json.loads(nst("plan", "digits", *overrides, "--store", str(finished), "--json"))
    by_name = {row["name"]: row for row in rows}
    assert by_name["1/label"]["status"] == "reused"
    assert by_name["1/select"]["reasons"] == ["select.min_confidence: 0.0 -> 0.2"]
    assert by_name["1/student"]["reasons"] == ["input 1/select is new"]
    assert Store(str(finished)).paths("") == before


def test_the_report_shows_the_evaluations_of_the_run(finished: Path, tmp_path: Path) -> None:
    nst("report", "digits", str(tmp_path / "report.html"), "--store", str(finished))
    page = (tmp_path / "report.html").read_text()
    records = json.loads(nst("results", "digits", "--json", "--store", str(finished)))
    (row,) = re.findall('<tr data-measure="clean top-1">(.*?)</tr>', page)
    assert re.findall(r"<td>([\d.]+) \(", row) == [f"{100 * record['top1']:.2f}" for record in records]
    assert "1/student: Is its confidence worth believing?" in page


def test_an_exported_model_is_loaded_by_timm_alone(finished: Path, tmp_path: Path) -> None:
    nst("export", "digits/1/student", str(tmp_path / "model"), "--store", str(finished))
    program = (
        "import sys, timm; from timm.data import resolve_data_config\n"
        "m = timm.create_model('local-dir:' + sys.argv[1], pretrained=True)\n"
        "c = resolve_data_config({}, model=m); print(m.num_classes, c['input_size'], c['mean'], c['crop_pct'])"
    )
    printed = run([sys.executable, "-c", program, str(tmp_path / "model")])
    assert printed.strip().endswith("10 [3, 28, 28] [0.13, 0.13, 0.13] 1.0"), printed


def test_under_a_prefect_server_reused_stages_end_as_reused_and_new_ones_as_completed(
    finished_copy: Path, tmp_path: Path, prefect_server: str
) -> None:
    environment = {"PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(tmp_path / "prefect")}
    run(command(finished_copy, "--rerun", "report", prefect="server"), **environment)
    runs = post(f"{prefect_server}/task_runs/filter", {})
    states = {task["name"]: task["state"]["name"] for task in runs}
    assert states.pop("report") == "Completed"
    assert len(states) == 8
    assert set(states.values()) == {"Reused"}
    (flow_run,) = post(f"{prefect_server}/flow_runs/filter", {})
    assert flow_run["state"]["name"] == "Completed"
    store = Store(str(finished_copy))
    report = get(store, "report", resolve_ref(store, "digits/report").key)
    assert report.provenance["prefect_run"] == flow_run["id"]


def test_the_ephemeral_api_needs_no_server_and_a_bad_override_ends_before_it_starts(
    finished_copy: Path, tmp_path: Path
) -> None:
    home = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": "http://127.0.0.1:1/api"}
    output = run(command(finished_copy, prefect="ephemeral"), **home)
    assert output.count(": reused") == 9, output
    assert "ERROR" not in output
    child = start(command(finished_copy, "student.epoch=3", prefect="ephemeral"), **home)
    printed = child.communicate(timeout=60)[0]
    assert child.returncode == 2
    assert printed.strip() == "error: override: unknown field student.epoch -> did you mean student.epochs?"


def test_one_stage_runs_as_a_flow_of_its_own_and_names_the_inputs_that_are_missing(
    finished_copy: Path, tmp_path: Path, prefect_server: str
) -> None:
    environment = {"PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(tmp_path / "prefect")}
    line = [sys.executable, "-m", "flows.cli", "stage", "1/select", "digits", *TINY, "--store", str(finished_copy)]
    run([*line, "select.images_per_class=50", "--prefect", "server"], **environment)
    (flow_run,) = post(f"{prefect_server}/flow_runs/filter", {})
    assert (flow_run["name"], flow_run["state"]["name"]) == ("digits select", "Completed")
    store = Store(str(finished_copy))
    selection = get(store, "selection", resolve_ref(store, "digits/1/select").key)
    assert set(selection.metrics["per_class"]["copies"]) <= {0, 50}
    child = start([*line, "teacher.epochs=41", "--prefect", "off"])
    printed = child.communicate(timeout=60)[0]
    assert child.returncode == 2
    assert "1/select needs 1/label, not made yet for this config" in printed


def test_every_artifact_carries_what_is_needed_to_reproduce_it(finished: Path) -> None:
    for manifest in list_artifacts(Store(str(finished))):
        assert manifest.provenance["packages"]["torch"]
        assert manifest.provenance["seconds"] >= 0
        assert set(manifest.provenance["code"]) == {"commit", "dirty"}
        assert str(finished) not in manifest.model_dump_json(), "a root path is no part of an artifact"


def test_a_teacher_from_outside_teaches_online_a_student_that_starts_from_it_and_is_fine_tuned(
    finished_copy: Path, tmp_path: Path
) -> None:
    """All of what a network may be given besides its data, through real stages; again, nothing is done twice."""
    nst("export", "digits/1/student", str(tmp_path / "model"), "--store", str(finished_copy))
    asked = (
        "order=once",
        f"teacher.pretrained=local-dir:{tmp_path / 'model'}",
        "teacher.epochs=0",
        "student.pseudo_label_source=online",
        "student.init=model",
        "student.finetune={epochs: 2, image_size: 32, frozen_layers: 0.5}",
    )
    line = command(finished_copy, overrides=(*TINY, *asked))
    run(line)
    store = Store(str(finished_copy))
    record = latest_run(store, "digits")
    assert record is not None
    names = [node.name for node in record.nodes]
    assert "1/label" not in names, "a teacher that works online stores no labels"
    made = {node.name: get(store, node.kind, node.key) for node in record.nodes}
    teacher, exported = made["0/teacher"], get(store, "model", resolve_ref(store, "digits/1/student@1").key)
    assert teacher.file("model.safetensors").sha256 == exported.file("model.safetensors").sha256
    assert teacher.metrics["num_steps"] == 0
    student, finetuned = made["1/student"], made["1/finetune"]
    assert student.inputs["teacher"] == student.inputs["initial"] == teacher.key
    assert finetuned.inputs["initial"] == student.key
    assert made["1/evaluate"].inputs["model"] == finetuned.key
    records = json.loads(nst("results", "digits", "--json", "--store", str(finished_copy)))
    assert [(r["role"], r["top1"] is not None) for r in records] == [
        ("teacher", True),
        ("student", False),
        ("finetune", True),
    ]
    assert run(line).count(": reused") == len(names)
    (tmp_path / "model/model.safetensors").unlink()
    child = start(line)
    assert "has no model.safetensors" in child.communicate(timeout=100)[0]
    assert child.returncode == 2
