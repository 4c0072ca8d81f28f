"""What a run leaves in Prefect's UI: real runs against a real server, asked through its API."""

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.ui_artifacts import ImpatientClient, artifact_key
from flows.ui_lineage import lineage_page
from flows.ui_pages import MOST_BYTES, Picture, RunView, fitted
from storage.artifacts import get
from storage.objects import Store
from storage.runs import latest_run, resolve_ref
from tests.fault_proxy import fault_proxy
from tests.flows.prefect_servers import post, serving
from tests.flows.runs import command, run, start
from tests.flows.tiny import Project

STAGES = (
    *("prepare", "unlabeled", "0/teacher", "0/evaluate"),
    *("1/label", "1/select", "1/student", "1/evaluate", "report"),
)
NUM_PICTURES = {"unlabeled": 1, "0/teacher": 3, "1/label": 1, "1/select": 3, "1/student": 3, "1/evaluate": 2}


class Server:
    """A server, and the store of the run that was made with it."""

    def __init__(self, url: str, folder: Path, store: Path) -> None:
        self.url, self.store = url, store
        self.environment = {"PREFECT_API_URL": url, "PREFECT_HOME": str(folder / "prefect")}

    def ask(self, what: str, **filters: Any) -> Any:
        """The objects of a kind: artifacts, task_runs, flow_runs."""
        return post(f"{self.url}/{what}/filter", filters)

    def versions(self, name: str) -> list[dict[str, Any]]:
        """All versions of a page, the newest first."""
        key = artifact_key("digits", name)
        return list(self.ask("artifacts", artifacts={"key": {"any_": [key]}}, sort="CREATED_DESC"))

    def text(self, name: str) -> str:
        """The Markdown of a page's newest version."""
        return str(self.versions(name)[0]["data"])


@pytest.fixture(scope="module")
def server(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that saw a run whose first half was reused, and the same run again."""
    folder = tmp_path_factory.mktemp("ui")
    store = Path(shutil.copytree(finished, folder / "store"))
    with serving(folder) as url:
        server = Server(url, folder, store)
        run(command(store, "--rerun", "select", prefect="server"), **server.environment)
        yield server


def pictures(markdown: str) -> list[Image.Image]:
    """The pictures of a page, decoded."""
    found = re.findall(r"!\[[^\]]*\]\(data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)\)", markdown)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_page_under_a_megabyte_with_its_pictures(server: Server, name: str) -> None:
    (page,) = server.versions(name)
    assert page["type"] == "markdown"
    assert len(page["data"].encode()) < 1_000_000
    store = Store(str(server.store))
    ref = resolve_ref(store, f"digits/{name}")
    assert f"{ref.kind} `{ref.key}`" in page["data"]
    made = pictures(page["data"])
    assert all(picture.width > 300 for picture in made)
    assert len(made) == NUM_PICTURES.get(name, len(made))
    (task,) = [task for task in server.ask("task_runs") if task["id"] == page["task_run_id"]]
    assert task["name"] == name


def test_a_selections_page_has_its_counts_of_all_and_of_each_class(server: Server) -> None:
    store, text = Store(str(server.store)), server.text("1/select")
    selection = get(store, "selection", resolve_ref(store, "digits/1/select").key).metrics
    for field in ("kept", "dropped", "duplicated", "total"):
        assert f"| {selection[field]:,} " in text
    rows = re.findall(r"^\| (\d) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    found = {
        field: [int(row[n].replace(",", "")) for row in rows]
        for n, field in enumerate(("available", "kept", "copies"), 1)
    }
    assert found == selection["per_class"]


def test_lineage_names_what_each_stage_was_made_from_and_links_to_pages_that_are_there(server: Server) -> None:
    keys = {artifact["id"]: artifact["key"] for artifact in server.ask("artifacts")}
    record = latest_run(Store(str(server.store)), "digits")
    assert record is not None
    by_key = {node.key: node.name for node in record.nodes}
    for iteration in (0, 1):
        graph = re.search(r"```mermaid\n(.*?)```", server.text(f"{iteration}/lineage"), re.DOTALL)
        assert graph is not None
        assert graph[1].startswith("flowchart TD\n")
        boxes = dict(re.findall(r'^  (\w+)\["<b>([\w/]+)</b>.*"\]$', graph[1], re.MULTILINE))
        edges = {
            (boxes[a], boxes[b]) for a, b in re.findall(r"^  (\w+) -->(?:\|\w+\|)? (\w+)$", graph[1], re.MULTILINE)
        }
        own = [n for n in record.nodes if n.name.startswith(f"{iteration}/") or (iteration == 0 and "/" not in n.name)]
        expected = {
            (by_key[key], n.name) for n in own if n.name != "report" for key in n.inputs.values() if key in by_key
        }
        assert edges == expected
        links = re.findall(r'^  click (\w+) "/v2/artifacts/artifact/([a-f0-9-]+)"$', graph[1], re.MULTILINE)
        assert [boxes[box] for box, _ in links] == list(boxes.values())
        assert [keys[page] for _, page in links] == [artifact_key("digits", boxes[box]) for box, _ in links]
        assert "not made yet" not in graph[1]


def test_results_show_what_nst_results_prints(server: Server) -> None:
    printed = run([sys.executable, "-m", "flows.cli", "results", "digits", "--json", "--store", str(server.store)])
    text = server.text("results")
    for record in json.loads(printed):
        counts = " | ".join("-" if record[f] is None else f"{record[f]:,}" for f in ("kept", "dropped", "duplicated"))
        row = rf"^\| \[{record['iteration']}/{record['role']}\]\(\S+\) \| {100 * record['top1']:.2f} \|.*{re.escape(counts)}"
        assert re.search(row, text, re.MULTILINE), text


def test_a_stage_at_work_has_a_progress_artifact_of_its_task_run(server: Server) -> None:
    tasks = {task["id"]: task["name"] for task in server.ask("task_runs")}
    found = {tasks[artifact["task_run_id"]]: artifact for artifact in server.versions("progress")}
    assert {"1/select", "1/student"} <= set(found) <= {"1/select", "1/student", "1/evaluate", "report"}
    student = found["1/student"]
    assert (student["type"], student["data"]) == ("progress", 100.0)
    assert re.match(r"1/student is done; (\d+) of \1 images, \d+ images/s", student["description"])


def test_a_reused_stage_says_which_page_shows_it_and_adds_no_version(server: Server) -> None:
    run(command(server.store, prefect="server"), **server.environment)
    reused = [task for task in server.ask("task_runs") if task["state"]["name"] == "Reused"]
    key = resolve_ref(Store(str(server.store)), "digits/1/label").key
    messages = {task["state"]["message"] for task in reused if task["name"] == "1/label"}
    assert messages == {f"labels {key} was in the store; the artifact digits-1-label shows it"}
    assert {len(server.versions(name)) for name in STAGES} == {1}
    assert len(server.versions("results")) == 2  # each run has its own


def test_a_failing_stage_shows_stage_artifact_rank_and_traceback_in_the_state_of_task_and_flow(server: Server) -> None:
    file = server.store / "no-folder"
    file.write_text("")
    arguments = ("--rerun", "student", f"compute.log_folder={file}/logs")
    child = start(command(server.store, *arguments, prefect="server"), **server.environment)
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 1, output
    flow = server.ask("flow_runs", sort="START_TIME_DESC")[0]
    (task,) = [t for t in server.ask("task_runs") if t["flow_run_id"] == flow["id"] and t["name"] == "1/student"]
    record = latest_run(Store(str(server.store)), "digits")
    assert record is not None
    (student,) = [node for node in record.nodes if node.name == "1/student"]
    for state in (task["state"], flow["state"]):
        assert state["name"] == "Failed"
        first, *rest = state["message"].splitlines()
        assert f"1/student (model {student.key[:12]}): models.training:train failed in rank 0 of 1: NotADir" in first
        assert rest[0] == "Traceback (most recent call last):"


def test_a_server_that_takes_no_artifact_is_a_warning_and_the_run_ends_well(server: Server) -> None:
    """Through a proxy that answers every request about artifacts with an error."""
    with fault_proxy(server.url.removesuffix("/api")) as proxy:
        proxy.do("500", path="/api/artifacts", times=1_000_000)
        environment = {**server.environment, "PREFECT_API_URL": f"{proxy.endpoint}/api"}
        before = len(server.ask("artifacts"))
        output = run(command(server.store, "--rerun", "report", prefect="server"), **environment)
    assert len(server.ask("artifacts")) == before
    assert output.count("Prefect's server did not take") == 1
    assert "report: report " in output


def test_one_client_serves_a_run_and_another_follows_a_failure(server: Server) -> None:
    def fail(client: object) -> None:
        raise OSError("away")

    with temporary_settings({PREFECT_API_URL: server.url}):
        client = ImpatientClient()
    first = client.ask(lambda own: own)
    assert client.ask(lambda own: own) is first
    assert client.ask(lambda own: own.hello().status_code) == 200
    assert client.ask(lambda own: PREFECT_CLIENT_MAX_RETRIES.value()) == 1
    with pytest.raises(OSError, match="away"):
        client.ask(fail)
    assert client.ask(lambda own: own) is not first
    client.close()


def test_a_page_leaves_out_the_pictures_that_do_not_fit() -> None:
    large, small = "data:image/png;base64," + "A" * (MOST_BYTES - 200), "data:image/png;base64,AAAA"
    page = fitted(["# title", Picture("large", large), Picture("second large", large), Picture("small", small)])
    assert len(page.encode()) <= MOST_BYTES
    assert f"![large]({large})" in page
    assert "left out, the page would be too large: second large" in page
    assert f"![small]({small})" in page


@pytest.mark.parametrize(
    ("experiment", "name", "key"),
    [("digits", "1/select", "digits-1-select"), ("my_birds", "prepare", "my-birds-prepare")],
)
def test_keys_are_what_prefect_allows(experiment: str, name: str, key: str) -> None:
    assert artifact_key(experiment, name) == key


def test_lineage_of_a_run_that_has_not_begun_draws_every_stage_and_links_to_none(tmp_path: Path) -> None:
    project = Project(tmp_path)
    nodes = project.resolve("order=once").nodes
    page = lineage_page(RunView("tiny", project.store, {}, lambda name: f"/{name}"), nodes, 2)
    assert set(re.findall(r"<b>([\w/]+)</b><br/>not made yet", page)) == {
        *("prepare", "unlabeled", "0/select", "1/student", "2/label", "2/student", "2/evaluate")
    }
    assert "s0_select -->|selection| s2_label" in page
    assert "s1_student -->|model| s2_label" in page
    assert "click" not in page
