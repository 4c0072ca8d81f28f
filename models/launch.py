"""The one module that starts processes: a child runs `models.worker` on a JSON spec, alone or as a torch elastic gang.

Children speak in lines: those that begin with `@nst ` carry one JSON record (progress, result, error), all others are
log. A child's output is always piped, because one that inherits stdout can hold a dead flow open; a child dies with
its parent (models/worker.py), and gets `GRACE_S` to write a checkpoint when it is asked to stop.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.errors import UserError

RECORD_PREFIX = "@nst "
GRACE_S = 25.0  # Prefect kills a cancelled flow after 30 s
LAST_LINES = 30
STOPPED_EXIT_CODE = 143

Record = dict[str, Any]


class WorkerFailed(Exception):
    """A child failed; the text holds the first failing rank's traceback, or its last lines where it left none."""


def run_worker(
    function: str,
    spec: dict[str, Any],
    *,
    world: int = 1,
    threads: int = 1,
    on_record: Callable[[Record], None] = lambda record: None,
    on_log: Callable[[str], None] = lambda line: None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Run `function` ("module:name") on a JSON spec in `world` child processes and return rank 0's result.

    Blocks until all processes are gone, on an exception too; `stop` ends them from another thread. Raises UserError where the child found bad input,
    WorkerFailed for every other failure.
    """
    with tempfile.TemporaryDirectory(prefix="nst-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps({"function": function, "spec": spec, "world": world, "threads": threads}))
        child = subprocess.Popen(
            [sys.executable, "-m", "models.worker", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=child_environment(threads),
            text=True,
            errors="replace",
        )
        finished = threading.Event()
        if stop is not None:
            threading.Thread(target=_stop_on, args=(child, stop, finished), daemon=True).start()
        try:
            records, last_lines = _listen(child, on_record, on_log)
            code = child.wait()
        finally:
            finished.set()
            stop_process(child)
    errors = sorted((r["error"] for r in records if "error" in r), key=lambda e: e["time"])
    if errors:
        first = errors[0]
        if first["user"]:
            raise UserError(first["message"])
        raise WorkerFailed(f"{function} failed in rank {first['rank']} of {world}:\n{first['traceback']}")
    results = [r["result"] for r in records if "result" in r]
    if code != 0 or not results:
        how = "was asked to stop" if code in (STOPPED_EXIT_CODE, -15) else f"ended with exit code {code}"
        raise WorkerFailed(f"{function} {how}; its last lines:\n" + "\n".join(last_lines))
    return results[0]


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a child: pinned threads, local rendezvous, no import from the working directory."""
    environment = dict(os.environ)
    pinned = str(threads)
    environment.update(
        OMP_NUM_THREADS=pinned,
        MKL_NUM_THREADS=pinned,
        PYTHONSAFEPATH="1",  # another repository's `tasks` in the working directory is never imported
        PYTHONUNBUFFERED="1",
        NST_PARENT=str(os.getpid()),
    )
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    root = str(Path(__file__).resolve().parent.parent)
    inherited = environment.get("PYTHONPATH", "")
    if root not in inherited.split(os.pathsep):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, inherited]))
    return environment


@functools.cache
def code_state() -> dict[str, Any]:
    """The program's own git commit and whether its tree was dirty; empty strings outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (root / ".git").exists():
        return {"commit": "", "dirty": False}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def stop_process(child: "subprocess.Popen[str]") -> None:
    """End a child and wait for it: SIGTERM, then SIGKILL after the grace. No effect on one that has ended."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _stop_on(child: "subprocess.Popen[str]", stop: threading.Event, finished: threading.Event) -> None:
    """Ask the child to end as soon as `stop` is set; it may have been set before the child started."""
    while not finished.is_set():
        if stop.wait(0.2):
            child.terminate()
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
            return


def _listen(
    child: "subprocess.Popen[str]", on_record: Callable[[Record], None], on_log: Callable[[str], None]
) -> tuple[list[Record], list[str]]:
    """Read the child's lines to the end; keep its results and errors and the last lines of its log."""
    kept: list[Record] = []
    last_lines: list[str] = []
    assert child.stdout is not None  # we asked for the pipe
    for line in child.stdout:
        line = line.rstrip("\n")
        record = _parse_record(line)
        if record is None:
            last_lines = [*last_lines, line][-LAST_LINES:]
            on_log(line)
            continue
        if "result" in record or "error" in record:
            kept.append(record)
        on_record(record)
    return kept, last_lines


def _parse_record(line: str) -> Record | None:
    if not line.startswith(RECORD_PREFIX):
        return None
    try:
        record = json.loads(line.removeprefix(RECORD_PREFIX))
    except ValueError:  # two ranks' lines ran into each other
        return None
    return record if isinstance(record, dict) else None
