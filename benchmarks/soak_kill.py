"""Soak: a small run, killed -9 at random moments, on a store of either kind; and what must hold after every kill.

python -m benchmarks.soak_kill --store file --kills 50       (or --store s3: a real server is started)

After each kill: every artifact that a reader can see is whole (`nst verify --all` finds nothing) and has the bytes of an
undisturbed run. When a run comes to its end its artifacts are compared, and the next one begins in an empty store.
Seven of ten kills hit the run itself, the others one of its children; on s3 each start has one of two caches, as if it
were on another machine.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from deployments.seaweedfs import BUCKET, s3_server
from storage.artifacts import list_artifacts
from storage.gc import collect, survey
from storage.objects import Store
from storage.verify import verify_all
from tests.flows.runs import TINY

LONGEST_S = 30.0
GONE_S = 20.0


def contents(store: Store) -> dict[str, dict[str, str]]:
    """The sha256 of every file of every visible artifact."""
    return {f"{m.kind} {m.key}": {f.name: f.sha256 for f in m.files} for m in list_artifacts(store)}


def start(store: Store, cache: Path, log: Path) -> "subprocess.Popen[bytes]":
    line = [sys.executable, "-m", "flows.cli", "run", "digits", *TINY, "--store", store.url, "--prefect", "off"]
    with log.open("ab") as output:
        environment = {**os.environ, "NST_CACHE_DIR": str(cache)}
        return subprocess.Popen(line, stdout=output, stderr=output, env=environment, start_new_session=True)


def check(store: Store, reference: dict[str, dict[str, str]], whole: bool) -> None:
    """Raise SystemExit where a visible artifact is not one of the reference, or anything is not as it was written."""
    found = contents(store)
    wrong = {name for name, files in found.items() if reference.get(name) != files}
    problems = verify_all(store).problems
    if wrong or problems or (whole and found != reference):
        sys.exit(f"FAILED on {store.url}: differ {wrong}, missing {reference.keys() - found}, problems {problems}")


def kill_once(process: "subprocess.Popen[bytes]", rng: random.Random) -> str:
    """Kill the run or one of its children at a random moment; "" where the run ended before."""
    try:
        process.wait(rng.uniform(0.3, LONGEST_S))
        return ""
    except subprocess.TimeoutExpired:
        pass
    family = psutil.Process(process.pid).children(recursive=True)
    victim = psutil.Process(process.pid) if not family or rng.random() < 0.7 else rng.choice(family)
    name = "run" if victim.pid == process.pid else "child"
    try:
        victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return ""
    try:
        process.wait(GONE_S if name == "child" else None)
    except subprocess.TimeoutExpired:  # a child that was not needed any more: the run goes on
        process.kill()
        process.wait()
    deadline = time.monotonic() + GONE_S
    while alive := [p for p in family if is_alive(p)]:
        if time.monotonic() > deadline:
            sys.exit(f"FAILED: processes outlived the run: {[p.cmdline() for p in alive]}")
        time.sleep(0.05)
    return name


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def soak(root: str, folder: Path, kills: int, rng: random.Random) -> dict[str, object]:
    """Kill until enough; the counts and the duration."""
    undisturbed = Store(f"{root}/undisturbed")
    if start(undisturbed, folder / "cache-0", folder / "undisturbed.log").wait():
        sys.exit((folder / "undisturbed.log").read_text())
    reference = contents(undisturbed)
    check(undisturbed, reference, whole=True)
    done = {"run": 0, "child": 0}
    completed, number, began = 0, 0, time.monotonic()
    while sum(done.values()) < kills or completed == 0:
        number += 1
        store, finished = Store(f"{root}/disturbed-{number}"), False
        while not finished:
            process = start(store, folder / f"cache-{rng.randrange(2)}", folder / "disturbed.log")
            if sum(done.values()) >= kills:
                process.wait()
                hit = ""
            else:
                hit = kill_once(process, rng)
            if hit:
                done[hit] += 1
                seen, elapsed = len(contents(store)), (time.monotonic() - began) / 60
                print(f"{elapsed:.1f} min, kill {sum(done.values())} ({hit}): {seen} artifacts visible", flush=True)
            elif process.returncode:
                sys.exit(f"FAILED: a run ended by itself:\n{(folder / 'disturbed.log').read_text()[-3000:]}")
            finished = not hit
            check(store, reference, whole=finished)
        completed += 1
        sweep = collect(store, days=0)
        check(store, reference, whole=True)
        if sweep.spared or survey(store, days=0).garbage:
            sys.exit(f"FAILED: gc left garbage; leases {sweep.leases}")
        print(f"run {number} is whole; gc deleted {len(sweep.garbage)} leftovers of the dead", flush=True)
    return {"kills": done, "completed_runs": completed, "minutes": round((time.monotonic() - began) / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", choices=["file", "s3"], default="file")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nst-soak-")))
        root = str(folder / "stores")
        if arguments.store == "s3":
            stack.enter_context(s3_server(folder / "server")).adopt()
            root = f"s3://{BUCKET}/soak"
        result = soak(root, folder, arguments.kills, random.Random(arguments.seed))
    print(json.dumps({"store": arguments.store, **result}))


if __name__ == "__main__":
    main()
