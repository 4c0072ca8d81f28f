"""Small real runs for the tests of the flows: 60 labeled digits, a network of 10,000 parameters, one iteration."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from storage.artifacts import list_artifacts
from storage.objects import Store

TINY = (
    "iterations=[{}]",
    "data.digits={labeled_per_class: 6, num_val: 100, num_test: 200, num_out_of_domain: 50}",
    "data.shard_images=400",
    "train.model.args={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}",
    "train.labeled_batch=20",
    "train.ema_decay=0.9",
    "teacher.epochs=40",
    "student.epochs=12",
    "student.batch_ratio=2",
    "train.num_validations=2",
    "select.min_confidence=0.0",
    "select.images_per_class=100",
    "select.on_empty_class=skip",
    "select.shard_images=200",
    "compute.ranks=1",
    "compute.threads=1",
    "compute.loader_workers=1",
    "compute.checkpoint_steps=5",
    "compute.task_images=400",
    "evaluate.corrupted=null",
)

HEAVY = ("torch", "torchvision", "timm", "prefect", "webdataset")
COMMANDS = """
import json, sys
from flows.cli import main

for line in json.loads(sys.argv[1]):
    sys.argv = ["nst", *line]
    main()
print(json.dumps(list(sys.modules)))
"""


def command(store: Path | str, *arguments: str, prefect: str = "off", overrides: tuple[str, ...] = TINY) -> list[str]:
    """The command line of a tiny run."""
    options = ["--store", str(store), "--prefect", prefect, *arguments]
    return [sys.executable, "-m", "flows.cli", "run", "digits", *overrides, *options]


def start(line: list[str], **environment: str) -> "subprocess.Popen[str]":
    """Start a command in a process group of its own, so that nothing it starts can be lost sight of."""
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def run(line: list[str], **environment: str) -> str:
    """Run a command to its end; its output. Fails the test where it does not end well."""
    child = start(line, **environment)
    output, _ = child.communicate(timeout=500)
    assert child.returncode == 0, output
    return output


def nst(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> str:
    """A command in a folder of its own; its output, both streams."""
    line = [sys.executable, "-m", "flows.cli", *arguments]
    python = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        line, cwd=cwd, env={**os.environ, **python, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def nst_in_one_process(lines: list[list[str]], cwd: Path) -> tuple[str, list[str]]:
    """Commands one after the other in a process: their output, and which heavy libraries were loaded for them."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(lines)], capture_output=True, text=True, cwd=cwd, timeout=500
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    return done.stdout, [name for name in HEAVY if name in loaded]


def kill_when(line: list[str], ready: Callable[[], bool], timeout_s: float = 240) -> None:
    """Start a command and kill -9 its main process as soon as `ready`; all its children must be gone soon after."""
    child = start(line)
    try:
        family = _wait_until(child, ready, timeout_s)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and any(_alive(process) for process in family):
            time.sleep(0.1)
        assert [p.cmdline() for p in family if _alive(p)] == [], "processes outlived the run that was killed"
    finally:
        if child.stdout is not None:
            child.stdout.close()


def wait_for_output(child: "subprocess.Popen[str]", text: str) -> list[psutil.Process]:
    """Read a command's output until a line holds `text`; the processes that it has started by then."""
    read_until(child, text)
    return psutil.Process(child.pid).children(recursive=True)


def read_until(child: "subprocess.Popen[str]", text: str) -> str:
    """A command's output up to the first line that holds `text`."""
    assert child.stdout is not None
    seen = []
    for line in child.stdout:
        seen.append(line)
        if text in line:
            return "".join(seen)
    raise AssertionError(f"the command ended without saying {text!r}:\n" + "".join(seen))


def count(store: Path, prefix: str, suffix: str = "") -> int:
    """How many objects lie below a prefix of a store that may not exist yet."""
    return sum(path.endswith(suffix) for path in Store(str(store)).paths(prefix)) if store.exists() else 0


def open_checkpoints(store: Path | str) -> int:
    """Checkpoints of models that are not committed."""
    opened = Store(str(store))
    paths = [p for p in opened.paths("artifacts/model") if p.endswith(".pt")]
    return sum(not opened.exists("/".join(p.split("/")[:3]) + "/manifest.json") for p in paths)


def contents(store: Path | str) -> dict[str, dict[str, str]]:
    """The sha256 of every file of every artifact, by artifact and logical name."""
    artifacts = list_artifacts(Store(str(store)))
    return {f"{m.kind}/{m.key}": {f.name: f.sha256 for f in m.files} for m in artifacts}


def _wait_until(child: "subprocess.Popen[str]", ready: Callable[[], bool], timeout_s: float) -> list[psutil.Process]:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert child.poll() is None, f"the run ended before it could be killed:\n{child.stdout.read()}"  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "the run never came to the place where it was to be killed"
        time.sleep(0.01)
    return psutil.Process(child.pid).children(recursive=True)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
