"""What Prefect costs: a finished experiment run again against Prefect's own start-up, and the demo with and without it.

    .venv/bin/python -m benchmarks.orchestration [--repeats 5] [--demo] [--recipe digits a.b=c ...]

Makes the experiment once, then takes turns: an empty flow, the finished experiment through Prefect's ephemeral API, and
the same without Prefect, each a process of its own with its start included. With --demo also the whole experiment from an
empty store, with and without Prefect, `--repeats` times each. Prints medians and spread. Exits with an error where an aim is missed:
a finished experiment ends within 5 s of an empty flow, Prefect adds less than 3 % to the experiment. What it adds beyond the
empty flow, Prefect's own start, is printed too.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

EMPTY_FLOW = """
from prefect import flow

@flow
def empty():
    return 1

empty()
"""
RERUN_AIM_S, DEMO_AIM = 5.0, 0.03
OFF, EPHEMERAL = "off", "ephemeral"


def timed(line: list[str], environment: dict[str, str]) -> float:
    """Seconds of a process, from start to end. Raises CalledProcessError."""
    started = time.perf_counter()
    subprocess.run(line, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def median_of(name: str, seconds: list[float]) -> float:
    """Print and return the median."""
    median = statistics.median(seconds)
    print(f"{name}: {median:.2f} s ({min(seconds):.2f}-{max(seconds):.2f})", flush=True)
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nst-orchestration-") as name:
        folder = Path(name)
        environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "DO_NOT_TRACK": "1"}

        def run(store: Path, prefect: str) -> float:
            command = [sys.executable, "-m", "flows.cli", "run", options.recipe, *options.overrides]
            return timed([*command, "--store", str(store), "--prefect", prefect], environment)

        start, missed = _rerun(run, folder / "store", environment, options.repeats)
        if options.demo:
            missed += _whole(run, folder, options.repeats, start)
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


def _rerun(
    run: Callable[[Path, str], float], store: Path, environment: dict[str, str], repeats: int
) -> tuple[float, list[str]]:
    """Seconds of an empty flow; the aims missed by a finished experiment that is run again."""
    print(f"made in {run(store, EPHEMERAL):.0f} s", flush=True)
    empty, through, without = [], [], []
    for _ in range(repeats):
        empty.append(timed([sys.executable, "-c", EMPTY_FLOW], environment))
        through.append(run(store, EPHEMERAL))
        without.append(run(store, OFF))
    start = median_of("an empty flow, Prefect's ephemeral API", empty)
    median_of("finished experiment, ephemeral API", through)
    median_of("finished experiment, without Prefect", without)
    more = statistics.median(ours - own for ours, own in zip(through, empty, strict=True))
    print(f"a finished experiment takes {more:.2f} s more than an empty flow, aim {RERUN_AIM_S}", flush=True)
    return start, ["a finished experiment"] if more > RERUN_AIM_S else []


def _whole(run: Callable[[Path, str], float], folder: Path, repeats: int, start: float) -> list[str]:
    """Aims missed by an experiment from an empty store; `start`: seconds of an empty flow."""
    seconds: dict[str, list[float]] = {OFF: [], EPHEMERAL: []}
    for _ in range(repeats):
        for prefect, found in seconds.items():
            found.append(run(folder / "whole", prefect))
            shutil.rmtree(folder / "whole")
    median_of("experiment from an empty store, ephemeral API", seconds[EPHEMERAL])
    median_of("experiment from an empty store, without Prefect", seconds[OFF])
    share = statistics.median(a / b for a, b in zip(seconds[EPHEMERAL], seconds[OFF], strict=True)) - 1
    more = statistics.median(a - b for a, b in zip(seconds[EPHEMERAL], seconds[OFF], strict=True))
    print(f"Prefect adds {share:.1%}, aim {DEMO_AIM:.0%}: {more:.1f} s, an empty flow takes {start:.1f} s", flush=True)
    return ["the whole experiment"] if share > DEMO_AIM else []


if __name__ == "__main__":
    main()
