"""How long `nst lineage` takes in a store of 10,000 artifacts, beside `nst ls`, which reads the same manifests.

python -m benchmarks.lineage [--artifacts 10000] [--repeats 3]

Fills a folder with made-up manifests, run records and refs, then runs the commands as a person does, in turns: a selection in
the middle of one experiment, and the data set that all share, whose lineage is the whole store. Prints seconds by the clock
and of CPU time (which others at work on the machine disturb less); fails where the tree of a selection takes more than twice
the CPU time of listing the artifacts.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from storage.objects import Store
from tests.lineage_stores import experiments, publish

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "nst --help": ["--help"],
    "nst ls": ["ls", "--json"],
    "tree of a selection": ["lineage", "birds-0003/1/select"],
    "JSON of a selection": ["lineage", "birds-0003/1/select", "--json"],
    "tree of the shared data set": ["lineage", "birds-0000/prepare"],
    "JSON of the shared data set": ["lineage", "birds-0000/prepare", "--json"],
    "mermaid of the shared data set": ["lineage", "birds-0000/prepare", "--mermaid"],
    "page of its 500 nearest": ["lineage", "birds-0000/prepare", "--html", "page.html", "--force"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as folder:
        store = Store(f"{folder}/store")
        number = 0
        for name, stages in experiments(options.artifacts):
            publish(store, name, stages)
            number += 1
        print(
            f"{len(store.paths('artifacts')):,} artifacts of {number:,} experiments, {len(store.paths('refs')):,} refs"
        )
        times: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(options.repeats):
            for name, line in COMMANDS.items():
                times[name].append(seconds(line, Path(folder)))
    medians = {}
    for name, own in times.items():
        clock, cpu = ([pair[n] for pair in own] for n in (0, 1))
        medians[name] = statistics.median(cpu)
        print(
            f"{name:32} {statistics.median(clock):6.2f} s ({min(clock):.2f}-{max(clock):.2f}), "
            f"CPU {medians[name]:.2f} s ({min(cpu):.2f}-{max(cpu):.2f})"
        )
    ratio = medians["tree of a selection"] / medians["nst ls"]
    print(f"CPU time of the tree of a selection against nst ls: {ratio:.2f}")
    sys.exit("more than twice that of nst ls" if ratio > 2 else 0)


def seconds(line: list[str], folder: Path) -> tuple[float, float]:
    """How long a command takes: by the clock, of CPU time."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "flows.cli", *line, *([] if line == ["--help"] else ["--store", "store"])],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu


if __name__ == "__main__":
    main()
