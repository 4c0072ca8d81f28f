"""Prefect's API for one command: it comes up, says why where it does not, and never outlives the command. Real servers."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

HOLDS_ONE = """
import os, time
import psutil
from flows.embedded import EmbeddedApi

api = EmbeddedApi()
api.wait()
print("up", psutil.Process().children()[0].pid, os.environ["PREFECT_API_URL"], flush=True)
{then}
"""
UP = re.compile(r"^up (\d+) (http://127\.0\.0\.1:\d+/api)$", re.MULTILINE)


def start_holder(then: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDS_ONE.format(then=then)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_gone(pid: int, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_it_answers_flows_and_ends_with_the_command(tmp_path: Path) -> None:
    flow = """
from prefect import flow

@flow
def nothing():
    return 1

nothing()
"""
    holder = start_holder(flow, PREFECT_HOME=str(tmp_path), PREFECT_LOGGING_LEVEL="CRITICAL")
    printed, said = holder.communicate(timeout=120)
    found = UP.search(printed)
    assert holder.returncode == 0, said
    assert found
    assert not psutil.pid_exists(int(found[1]))
    assert (tmp_path / "prefect.db").exists()  # a server that is started later shows the run
    assert "Error" not in said, said  # the last logs reach the API before it ends


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent was killed")
def test_it_ends_where_the_command_is_killed(tmp_path: Path) -> None:
    holder = start_holder("time.sleep(600)", PREFECT_HOME=str(tmp_path))
    assert holder.stdout is not None
    found = UP.search(holder.stdout.readline())
    assert found
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=60)
    assert wait_until_gone(int(found[1]))


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    nowhere = f"sqlite+aiosqlite:///{tmp_path}/no-such-folder/prefect.db"
    holder = start_holder("", PREFECT_HOME=str(tmp_path), PREFECT_API_DATABASE_CONNECTION_URL=nowhere)
    printed, said = holder.communicate(timeout=180)
    assert holder.returncode == 1
    assert not UP.search(printed)
    assert "Prefect's API ended with code" in said
    assert "--prefect off does without it" in said
    assert "unable to open database file" in said


def test_another_port_is_taken_where_the_first_is_used(tmp_path: Path) -> None:
    taken = """
import socket
from flows import embedded

listening = socket.create_server((embedded.HOST, 0))
ports = [listening.getsockname()[1]]
free_port = embedded.free_port
embedded.free_port = lambda host: ports.pop() if ports else free_port(host)
"""
    code = HOLDS_ONE.format(then="")
    done = subprocess.run(
        [sys.executable, "-c", taken + code],
        env={**os.environ, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert UP.search(done.stdout)
