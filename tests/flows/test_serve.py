"""`nst serve`, for real: its server, its worker, its deployments; runs through the API; and what is left when it ends."""

import os
import signal
import socket
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from storage.objects import Store
from storage.runs import latest_run
from tests.flows.runs import TINY, nst, open_checkpoints
from tests.flows.served import READY, Served, free_port, serving_store
from tests.flows.tiny import RECIPE, write_recipe
from tests.real_images import write_splits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def served(finished_copy: Path, tmp_path: Path) -> Iterator[Served]:
    """Started on the store of a finished tiny run."""
    with serving_store(finished_copy, tmp_path / "state") as served:
        yield served


@pytest.mark.soak
def test_every_flow_is_ready_to_click_and_ctrl_c_leaves_no_process(served: Served, tmp_path: Path) -> None:
    shipped = [d["name"] for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]]
    found = {d["name"]: d for d in served.call("deployments/filter", {})}
    assert found.keys() == set(shipped)
    assert [schedule["active"] for schedule in found["noisy-student"]["schedules"]] == [False]
    assert {deployment["global_concurrency_limit"]["limit"] for deployment in found.values()} == {1}

    run = served.click("noisy-student", recipe="digits", overrides=list(TINY), rerun="report")
    assert served.wait(run, "Completed")["name"] == "digits"
    states = served.tasks(run)
    assert states.pop("report") == "Completed"
    assert set(states.values()) == {"Reused"}

    run = served.click("next-iteration", experiment="digits", overrides=["student.epochs=2"])
    served.wait(run, "Completed")
    record = latest_run(Store(str(served.store)), "digits")
    assert record is not None
    assert (record.prefect_run, record.nodes[-2].name) == (run, "2/evaluate")

    recipe = write_recipe(tmp_path, RECIPE)
    own = {"recipe_url": recipe, "overrides": [f"data.root={write_splits(tmp_path / 'images')}"]}
    assert served.wait(served.click("prepare", iteration=0, **own), "Completed")["name"] == "tiny prepare"

    before = served.store.stat().st_mtime_ns, Store(str(served.store)).paths("")
    failed = served.wait(served.click("noisy-student", recipe="digits", overrides=["student.epoch=3"]), "Failed")
    assert "override: unknown field student.epoch -> did you mean student.epochs?" in failed["state"]["message"]
    assert before == (served.store.stat().st_mtime_ns, Store(str(served.store)).paths("")), "no work was begun"
    with pytest.raises(urllib.error.HTTPError) as refused:
        served.click("noisy-student", recipe="no such recipe")
    assert refused.value.code in (409, 422)

    run = served.train()
    asked = time.monotonic()
    code, said = served.end(signal.SIGINT)
    assert (code, served.left()) == (0, []), said
    assert "stopping; a run that is at work writes its checkpoint first" in said
    assert time.monotonic() - asked < 60
    assert open_checkpoints(served.store) == 1, served.log()
    with sqlite3.connect(served.state / "prefect.db") as database:
        (state,) = database.execute("SELECT state_name FROM flow_run WHERE id = ?", [run]).fetchone()
    assert state == "Cancelled"


@pytest.mark.soak
def test_with_a_password_it_works_and_nobody_else_reaches_its_api(finished_copy: Path, tmp_path: Path) -> None:
    with serving_store(finished_copy, tmp_path / "state", "nst:secret") as served:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{served.port}/api/work_pools/default", timeout=20)
        assert refused.value.code == 401
        run = served.click("noisy-student", recipe="digits", overrides=list(TINY))
        served.wait(run, "Completed")
        assert set(served.tasks(run).values()) == {"Reused"}
        assert served.call("artifacts/filter", {}), "its pages reach the server too"
        code, said = served.end(signal.SIGINT)
        assert (code, served.left()) == (0, []), said


@pytest.mark.soak
def test_killed_it_takes_all_with_it_and_goes_on_with_the_run_the_next_time(served: Served) -> None:
    """SIGKILL, which it cannot answer; then a start on the same state."""
    run = served.train()
    assert served.process is not None
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.communicate()
    deadline = time.monotonic() + 40
    while left := served.left():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    served.start()
    served.wait_for_restart(run, crashes=1)
    (crash,) = [s for s in served.call(f"flow_run_states/?flow_run_id={run}") if s["name"] == "Crashed"]
    assert "nst serve was killed" in crash["message"]
    line = ["serve", "--port", str(free_port()), "--store", str(served.store)]
    assert "another nst serve uses" in nst(*line, "--state", str(served.state), cwd=served.state, code=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    """Also SIGINT below a shell that ignores it, as a script does for what it starts with `&`."""
    served = Served(tmp_path / "store", tmp_path / "state")
    process = served.begin("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    try:
        deadline = time.monotonic() + 60
        while not (served.state / "server.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, said = served.end(number)
        assert (code, served.left()) == (0, []), said
        assert READY not in said
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        options = ["--port", port, "--store", str(tmp_path / "store"), "--state", str(tmp_path / "state")]
        said = nst("serve", *options, cwd=tmp_path, code=2)
    assert f"port {port} of 127.0.0.1 is taken" in said
    assert "choose another with --port" in said
