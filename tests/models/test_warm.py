"""The warm parent: jobs start at once, in processes of their own, and nothing depends on it living."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from models.failures import WorkerFailed
from models.launch import WarmParent, run_worker
from storage.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the warm parent is used on Linux only")


def inspection(name: str = "resnet18") -> dict[str, Any]:
    """A small job that needs timm."""
    return {"models": {"teacher.model": {"name": name, "image_size": 32}}, "num_classes": 3}


def inspect(name: str = "resnet18") -> dict[str, int]:
    counts: dict[str, int] = run_worker("models.zoo:inspect_models", inspection(name))["num_parameters"]
    return counts


def test_jobs_are_forked_by_one_parent_and_a_second_job_need_not_load_torch() -> None:
    inspect()
    parent = WarmParent.of_this_process().pid
    started = time.process_time(), psutil.Process(parent).cpu_times()
    assert inspect() == {"teacher.model": 11_178_051}
    assert WarmParent.of_this_process().pid == parent
    loading = psutil.Process(parent).cpu_times().user - started[1].user
    assert loading < 1.0, "the parent loaded something for the second job"
    assert psutil.Process(parent).children() == []


def test_a_users_mistake_crosses_as_one() -> None:
    with pytest.raises(UserError, match="teacher.model.name=resnet81"):
        inspect("resnet81")


def test_a_parent_that_was_killed_is_replaced() -> None:
    inspect()
    os.kill(WarmParent.of_this_process().pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:  # the kill may be noticed during the next job
        try:
            assert inspect() == {"teacher.model": 11_178_051}
            return
        except WorkerFailed:
            assert time.monotonic() < deadline


def test_the_parent_ends_with_its_process_even_before_it_has_loaded() -> None:
    program = "from models.launch import WarmParent, warm_up; warm_up(); print(WarmParent.of_this_process().pid)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert not psutil.pid_exists(int(done.stdout))
    assert time.monotonic() - started < 15
