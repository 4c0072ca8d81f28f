"""What people do in Prefect's UI, in a real browser on a real `nst serve`: run, schedule, retry, rerun, cancel, look.

What the page says is held against the store and the processes. NST_SCREENSHOTS names a folder for pictures of the pages.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Browser, expect

from flows.experiment import shipped_recipes
from flows.graph import ROLES
from flows.iteration import noisy_student
from models.checkpoints import list_checkpoints
from storage.artifacts import find, get
from storage.objects import Store
from storage.runs import RunRecord, latest_run, list_runs
from storage.verify import verify_all
from tests.flows.browser import NARROW, UI, WIDE, open_browser
from tests.flows.runs import TINY, open_checkpoints
from tests.flows.served import Served, serving_store

pytestmark = pytest.mark.soak  # minutes, and a browser beside a server on two cores

STAGES = ("prepare", "unlabeled", "0/teacher", "0/evaluate", "1/label", "1/select", "1/student", "1/evaluate", "report")
DRAWN = (
    "prepare",
    "unlabeled",
    "0/teacher",
    "1/label",
    "1/select",
    "1/student",
    "1/evaluate",
)  # lineage of iteration 1
GONE_S = 30  # what Prefect gives a run that is cancelled


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(browser: Browser, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Started on the store of a finished tiny run, for all tests: each adds runs to it."""
    folder = tmp_path_factory.mktemp("browser")
    with serving_store(Path(shutil.copytree(finished, folder / "store")), folder / "state") as served:
        yield served


@pytest.fixture(scope="module")
def shown(served: Served) -> tuple[str, RunRecord]:
    """A run whose pages the UI has, and its record (one that finds everything has that of the run before it)."""
    run = served.click("noisy-student", recipe="digits", overrides=list(TINY))
    served.wait(run, "Completed")
    record = latest_run(Store(str(served.store)), "digits")
    assert record is not None
    return run, record


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("NST_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def ui(browser: Browser, served: Served, pictures: Path) -> Iterator[UI]:
    """A wide window, in which nothing breaks; afterwards no run's process is left, and the store is whole."""
    ui = UI(browser, served, pictures)
    yield ui
    ui.page.close()
    assert ui.broken == []
    assert_calm(served)
    assert verify_all(Store(str(served.store))).problems == []


def assert_calm(served: Served) -> None:
    """Nothing that a run started is left soon, and nothing that ended waits to be waited for."""
    deadline = time.monotonic() + GONE_S
    while (left := served.of_run()) or (dead := served.zombies()):
        assert time.monotonic() < deadline, (left, dead)
        time.sleep(0.2)


def record_of(served: Served, run: str) -> RunRecord:
    """The record of a run, which must have one only."""
    (record,) = [r for r in list_runs(Store(str(served.store)), "digits") if r.prefect_run == run]
    return record


def keys(record: RunRecord) -> dict[str, str]:
    return {node.name: node.key for node in record.nodes}


def provenance(served: Served, record: RunRecord, name: str) -> dict[str, Any]:
    """How an artifact of a run came to be."""
    node = record.node(name)
    assert node is not None
    return dict(get(Store(str(served.store)), node.kind, node.key).provenance)


def made_by(served: Served, record: RunRecord) -> list[str]:
    """The stages whose artifacts this run made itself."""
    return [n.name for n in record.nodes if provenance(served, record, n.name)["prefect_run"] == record.prefect_run]


def test_a_run_from_the_form_makes_what_its_overrides_change_and_reuses_the_rest(served: Served, ui: UI) -> None:
    ui.open_form("noisy-student")
    properties = served.deployment("noisy-student")["parameter_openapi_schema"]["properties"]
    for field in properties.values():
        expect(ui.field(field["title"])).to_contain_text(field["description"])
    assert ui.choices("Recipe") == list(shipped_recipes())
    before = latest_run(Store(str(served.store)), "digits")
    assert before is not None
    ui.choose("Recipe", "digits")
    ui.write_list("Overrides", [o.replace("student.epochs=12", "student.epochs=5") for o in TINY])
    ui.picture("form")
    run = ui.submit()

    served.wait(run, "Completed")
    record = record_of(served, run)
    assert record.config["iterations"][0]["epochs"] == 5
    changed = ["1/student", "1/evaluate", "report"]
    assert [name for name in STAGES if keys(record)[name] != keys(before)[name]] == changed
    assert made_by(served, record) == changed
    assert served.tasks(run) == {name: "Completed" if name in changed else "Reused" for name in STAGES}
    address = f"http://127.0.0.1:{served.port}/v2/runs/flow-run/{run}"
    assert address in (served.state / "worker.log").read_text(), "a run's log says where the UI shows it"
    ui.open_run(run, "TaskRuns")
    expect(ui.page.get_by_text("Reused", exact=True)).to_have_count(len(STAGES) - len(changed))
    ui.picture("run-done")


def test_an_untouched_schedule_stores_nothing_that_its_runs_could_not_take(served: Served, ui: UI) -> None:
    before = {schedule["id"] for schedule in served.deployment("noisy-student")["schedules"]}
    ui.open_deployment("noisy-student")
    ui.button("Schedule").first.click()
    dialog = ui.page.get_by_role("dialog")
    expect(dialog.get_by_text("Recipe (Optional)", exact=True)).to_be_visible()
    ui.picture("schedule")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_have_count(0)
    deployment = served.deployment("noisy-student")
    (added,) = [schedule for schedule in deployment["schedules"] if schedule["id"] not in before]
    parameters = {**deployment["parameters"], **added["parameters"]}
    noisy_student.validate_parameters(parameters)
    assert parameters == deployment["parameters"]

    of_it = {
        "deployments": {"id": {"any_": [deployment["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    deadline = time.monotonic() + 100
    while not (scheduled := served.call("flow_runs/filter", of_it)):
        assert time.monotonic() < deadline, "the schedule made no runs"
        time.sleep(0.5)
    assert all(run["parameters"] == parameters for run in scheduled)


def test_retry_of_a_failed_run_does_what_is_missing_once_the_cause_is_gone(served: Served, ui: UI) -> None:
    before = latest_run(Store(str(served.store)), "digits")
    assert before is not None
    store = Store(str(served.store))
    selection = get(store, "selection", keys(before)["1/select"])
    shard = served.store / next(file.path for file in selection.files if file.path.endswith(".tar"))
    away = shard.rename(served.store.parent / shard.name)
    run = served.click("noisy-student", recipe="digits", overrides=list(TINY), rerun="student")
    served.wait(run, "Failed")
    ui.open_run(run, "Details")
    expect(ui.page.get_by_text(f"{shard.name} is missing").first).to_be_visible()
    ui.picture("failed")
    away.rename(shard)
    ui.do("Retry")
    ui.picture("retry")
    ui.confirm("Retry")
    ui.look_away()
    served.wait(run, "Completed")
    record = record_of(served, run)
    assert record.generations["1/student"] == before.generations["1/student"] + 1
    missing = ["1/student", "1/evaluate", "report"]
    assert made_by(served, record) == missing
    assert served.tasks(run) == {name: "Completed" if name in missing else "Reused" for name in STAGES}
    ui.open_run(run, "TaskRuns")
    expect(ui.page.get_by_text("3 Completed, 12 Reused, 1 Failed")).to_be_visible()  # of both attempts
    ui.picture("retried")


def test_rerun_of_one_stage_from_the_form_makes_it_and_its_successors_anew(
    served: Served, shown: tuple[str, RunRecord], ui: UI
) -> None:
    first, before = shown
    ui.open_run(first)
    ui.copy_run(TINY)
    assert ui.choices("Rerun") == ["nothing", *ROLES]
    ui.choose("Rerun", "select")
    ui.picture("rerun")
    run = ui.submit()

    served.wait(run, "Completed")
    record = record_of(served, run)
    anew = ["1/select", "1/student", "1/evaluate", "report"]
    assert [name for name in STAGES if keys(record)[name] != keys(before)[name]] == anew
    assert made_by(served, record) == anew
    store = Store(str(served.store))
    for node in before.nodes:  # the former versions stay
        assert find(store, node.kind, node.key) is not None
    assert served.tasks(run) == {name: "Completed" if name in anew else "Reused" for name in STAGES}


def test_a_cancelled_training_leaves_a_checkpoint_and_no_process_and_goes_on_from_there(served: Served, ui: UI) -> None:
    overrides = [*TINY, "student.epochs=150", "compute.checkpoint_steps=1000000", "compute.checkpoint_seconds=1000000"]
    run = served.click("noisy-student", recipe="digits", overrides=overrides)
    served.wait(run, "Running")
    ui.open_run(run)
    ui.do("Cancel")
    wait_until_trained(served, run)
    family = served.of_run(run)
    assert len(family) > 1
    ui.confirm("Cancel Flow Run")
    _, alive = psutil.wait_procs(family, timeout=GONE_S)
    assert (alive, served.of_run(run)) == ([], []), "processes outlived the run that was cancelled"
    served.wait(run, "Cancelled")
    expect(ui.page.get_by_text("Cancelled", exact=True).first).to_be_visible()
    ui.picture("cancelled")
    assert open_checkpoints(served.store) == 1, served.log()
    (checkpoint,) = list_checkpoints(Store(str(served.store)), keys(record_of(served, run))["1/student"])

    ui.copy_run(overrides)
    again = ui.submit()
    served.wait(again, "Completed", timeout_s=400)
    student = provenance(served, record_of(served, run), "1/student")
    assert student["prefect_run"] == again
    assert f"/step-{student['resumed_at_step']:09d}-" in checkpoint
    assert open_checkpoints(served.store) == 0


def wait_until_trained(served: Served, run: str) -> None:
    """Return as soon as the student of a run has trained for a while."""
    wanted = {"artifacts": {"flow_run_id": {"any_": [run]}, "type": {"any_": ["progress"]}}}
    deadline = time.monotonic() + 100
    while not any("1/student" in found["description"] for found in served.call("artifacts/filter", wanted)):
        assert time.monotonic() < deadline, served.log()
        time.sleep(0.3)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_lineage_and_a_stages_page_are_drawn_whole_on_a_desk_and_on_a_phone(
    served: Served, shown: tuple[str, RunRecord], browser: Browser, pictures: Path, width: int
) -> None:
    ui, (run, record) = UI(browser, served, pictures, width), shown
    made = keys(record)
    wanted = {"artifacts": {"flow_run_id": {"any_": [run]}, "key": {"any_": ["digits-1-lineage"]}}}
    (lineage,) = served.call("artifacts/filter", wanted)
    ui.open(f"artifacts/artifact/{lineage['id']}")
    graph = ui.page.locator("svg[aria-roledescription^=flowchart]")
    expect(graph).to_be_visible()
    boxes = graph.locator(".node")
    expect(boxes).to_have_count(len(DRAWN))
    for name in DRAWN:
        expect(boxes.filter(has_text=name)).to_contain_text(made[name][:12])
    assert ui.fits(graph)
    ui.picture("lineage")

    boxes.filter(has_text="1/select").click()
    page = ui.page.get_by_test_id("markdown-display")
    expect(page.get_by_role("heading", name="digits/1/select")).to_be_visible()
    expect(page).to_contain_text(made["1/select"])
    images = page.locator("img")
    expect(images).to_have_count(3)
    ui.page.wait_for_function(
        "[...document.querySelectorAll('[data-testid=markdown-display] img')].every(i => i.complete)"
    )
    for n in range(3):
        assert images.nth(n).evaluate("image => image.naturalWidth") > 300
        assert ui.fits(images.nth(n))
    page.get_by_text("All classes").click()
    expect(page.get_by_role("row", name="9", exact=False).last).to_be_visible()
    assert "data:image" not in ui.page.locator("body").inner_text()
    ui.picture("select")
    ui.page.close()
    assert ui.broken == []
