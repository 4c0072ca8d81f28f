"""What a child's malloc is told at its start."""

import os
import subprocess
import sys

import pytest

from models.launch import child_environment
from models.memory import HUGE_PAGES, TUNABLES

FAULTS = """
import resource, sys
from models.memory import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
import numpy
for _ in range(int(sys.argv[1])):
    together = [numpy.ones(8 << 20) for _ in range(int(sys.argv[2]))]
    del together
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def test_a_child_asks_for_huge_pages_unless_the_user_said_something_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TUNABLES, raising=False)
    assert child_environment(1)[TUNABLES] == f"{HUGE_PAGES}=1"
    monkeypatch.setenv(TUNABLES, "glibc.malloc.check=1")
    assert child_environment(1)[TUNABLES] == f"glibc.malloc.check=1:{HUGE_PAGES}=1"
    monkeypatch.setenv(TUNABLES, f"{HUGE_PAGES}=0")
    assert child_environment(1)[TUNABLES] == f"{HUGE_PAGES}=0"


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is glibc's on Linux alone")
@pytest.mark.parametrize(("times", "arrays"), [(20, 1), (4, 24)], ids=["64 MB, 20 times", "1.5 GB in 64 MB, 4 times"])
def test_freed_memory_is_not_faulted_in_again(times: int, arrays: int) -> None:
    environment = {**os.environ, TUNABLES: f"{HUGE_PAGES}=0"}

    def faults(*how: str) -> int:
        line = [sys.executable, "-c", FAULTS, str(times), str(arrays), *how]
        return int(subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 0.5 * faults()
