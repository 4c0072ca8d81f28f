"""What malloc's settings are worth for a training step on a CPU: the step of tensors that lie ready, with and without them.

python -m benchmarks.step_memory [--model efficientnet_b0] [--size 224] [--batch 50] [--repeats 3] [--seconds 10]

Compiled float32, all cores; by default, with freed memory kept, and with huge pages too (models/memory.py), in turns. Prints
images a second and ratios; fails where the settings together do not make it faster.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.training import BARE, spec
from benchmarks.turns import Contender

NUMERICS = {"device": "cpu", "dtype": "float32", "layout": "channels_last", "compile": True, "batch": 16}
WAYS = {"by default": (False, False), "freed memory kept": (True, False), "huge pages too": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="that each turn is timed")
    options = parser.parse_args()
    options.device = "cpu"
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name:
        job = {**spec(options, Path(name), "", NUMERICS, 1, 1), "warm": 2, "seconds": options.seconds}
        contenders = {
            way: Contender(Path(name), way, BARE, {**job, "keep_memory": kept}, huge_pages=huge)
            for way, (kept, huge) in WAYS.items()
        }
        for _ in range(options.repeats):
            print({way: round(contender.turn(), 1) for way, contender in contenders.items()}, flush=True)
        for contender in contenders.values():
            contender.end()
    plain, *_, best = contenders.values()
    ratios = [a / b for a, b in zip(best.rates, plain.rates, strict=True)]
    median = statistics.median(ratios)
    print(f"with both: {median:.2f} times as fast ({min(ratios):.2f}-{max(ratios):.2f})")
    sys.exit("not faster" if median <= 1 else 0)


if __name__ == "__main__":
    main()
