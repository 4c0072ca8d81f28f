"""The entry of every child process: `python -m models.worker SPEC.json`; started by models/launch.py only.

Runs the function that the spec names as `function(spec, worker) -> dict`. With world > 1, or where it is to join a training
of other machines, the first process becomes torch elastic's agent and starts the ranks, which run this file again. torch is imported by the function, not here, so
that decoding and writing shards does not pay for it.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.failures import STOPPED_EXIT_CODE
from models.heard import RECORD_PREFIX
from models.launch import PR_SET_PDEATHSIG
from models.meeting import arrive, tell, told
from storage.errors import StoreAway, UserError, explained

PROGRESS_INTERVAL_S = 0.3


class Stopped(Exception):
    """The worker was asked to stop and has saved what it could."""


class Worker:
    """What a worker function knows of its process: its rank, whether it should stop, and how to report."""

    def __init__(self, rank: int = 0, world: int = 1, threads: int = 1) -> None:
        self.rank = rank
        self.world = world
        self.threads = threads
        self.stop_requested = False
        self.place = ""  # what an error that is raised now is about: a shard, a step
        self._last_progress = 0.0

    def progress(self, done: int, total: int, unit: str = "images", last: bool = False, **facts: Any) -> None:
        """Report how far this worker is; throttled, so call it freely. Only rank 0 speaks."""
        now = time.monotonic()
        if self.rank == 0 and (last or now - self._last_progress >= PROGRESS_INTERVAL_S):
            self._last_progress = now
            self.emit({"progress": {"done": done, "total": total, "unit": unit, **facts}})

    def at(self, place: str) -> None:
        """Say what the work is about from now on, so that any failure names it, a sudden death of this process too."""
        self.place = place
        self.emit({"at": place})

    def emit(self, record: dict[str, Any]) -> None:
        """Write one structured record to the parent, in one write so that ranks' lines do not mix."""
        os.write(1, (RECORD_PREFIX + json.dumps(record) + "\n").encode())


def main() -> int:
    """Read the spec, run its function, report the result or the error."""
    die_with_parent()
    job = json.loads(Path(sys.argv[1]).read_text())
    if "RANK" not in os.environ and (job["world"] > 1 or job["meeting"]):
        return _run_agent(job)
    worker = Worker(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), job["threads"])

    def request_stop(signum: int, frame: object) -> None:
        worker.stop_requested = True

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent turns it into SIGTERM
    try:
        module, _, name = job["function"].partition(":")
        result = getattr(importlib.import_module(module), name)(job["spec"], worker)
    except Stopped:
        return STOPPED_EXIT_CODE
    except Exception as caught:
        error = explained(caught) or caught
        record = {
            "error": {
                "rank": worker.rank,
                "time": time.time(),
                "user": isinstance(error, UserError),
                "away": isinstance(error, StoreAway),
                "place": worker.place,
                "message": str(error),
                "cause": f"{type(error).__name__}: {error}",
                "traceback": _without_carets(traceback.format_exc()),
            }
        }
        worker.emit(record)
        tell(record)
        return 1
    if worker.rank == 0:
        worker.emit({"result": result})
    return 0


def _without_carets(text: str) -> str:
    """A traceback without the lines of ^ and ~: where it is shown line breaks may be lost, as in Prefect's UI."""
    return "\n".join(line for line in text.splitlines() if line.strip(" ^~"))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, and leave at once if it has ended already (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get("NST_PARENT")
    if expected and os.getppid() != int(expected):
        sys.exit(STOPPED_EXIT_CODE)


def _run_agent(job: dict[str, Any]) -> int:
    """Become torch elastic's agent for the ranks of this machine."""
    if not job["meeting"]:
        alone = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={job['world']}"]
        return _run_elastic(alone, lambda: [])
    agent = Worker()
    try:
        job, arguments, store = arrive(job)
    except UserError as error:
        print(error, flush=True)
        return 1
    Path(sys.argv[1]).write_text(json.dumps(job))  # what the ranks read
    agent.emit({"met": {"id": job["id"], "function": job["function"], "store": job["spec"].get("store", "")}})
    return _run_elastic(arguments, lambda: told(store, job))


def _run_elastic(arguments: list[str], elsewhere: Callable[[], list[dict[str, Any]]]) -> int:
    """torch elastic in script mode (it stops within 2 s of SIGTERM; `elastic_launch` takes 31 s).

    `elsewhere`: the failures of ranks on other machines.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["NST_PARENT"] = str(os.getpid())
    try:
        run.main([*arguments, "--max-restarts=0", "-m", "models.worker", sys.argv[1]])
    except SignalException:
        return STOPPED_EXIT_CODE
    except ChildFailedError as error:  # a failing rank has reported its own error, one that was killed cannot
        if {failure.exitcode for failure in error.failures.values()} == {STOPPED_EXIT_CODE}:
            return STOPPED_EXIT_CODE  # a rank was asked to stop, here or on another machine, and all agreed
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:
                record = {"killed": {"rank": rank, "signal": -failure.exitcode}}
                Worker(rank).emit(record)
                tell(record)
        for record in elsewhere():
            Worker().emit(record)
        return 1
    except Exception as error:
        print(f"torch elastic: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    from models import worker as imported  # this file is `__main__` here: its own Stopped is not the one that is raised

    sys.exit(imported.main())
