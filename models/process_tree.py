"""Parents and children as the kernel sees them: ending with one's parent, adopting orphans, ending all that is left (Linux)."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from models.launch import PR_SET_PDEATHSIG

PR_SET_CHILD_SUBREAPER = 36
ENDS_WITH_PARENT = "NST_ENDS_WITH_PARENT"


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, where `ENDS_WITH_PARENT` is in the environment (Linux).

    Raises SystemExit where it has ended already.
    """
    if os.environ.get(ENDS_WITH_PARENT) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            raise SystemExit("the parent of this process has ended, and so does this")


def adopt_orphans() -> None:
    """Have what this process's children leave behind become its own children, for `end_children` to find (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_children(spare: Sequence[int] = ()) -> None:
    """Kill every child of this process, and theirs where `adopt_orphans` was called; returns when they are gone.

    Those whose process ids are in `spare` are left alone, with what they have started.
    """
    while children := [pid for pid in _children_of(os.getpid()) if pid not in spare]:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children_of(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found
