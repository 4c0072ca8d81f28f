"""The gain of a recipe over several seeds: is the student better than its teacher, on average?

    .venv/bin/python benchmarks/gain.py [--recipe digits] [--scale cpu] [--seeds 5] [--tune] [--store FOLDER] [a.b=c ...]

Runs the recipe once a seed (of networks, order, noise and selection; for the digits also of the splits) in one store, and
prints top-1 of teacher and students on the validation and the test images, the mean gain over the teacher and over the
network before, with their standard errors. Settings are chosen with `--tune`, which leaves the test images out.
Fails where the last student of five seeds or more is not better than the teacher on average.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

Runs = list[list[dict[str, Any]]]


def run_seed(options: argparse.Namespace, store: str, seed: int) -> list[dict[str, Any]]:
    """One experiment; its result records."""
    name = f"{options.recipe}-seed{seed}"
    own = [f"name={name}", f"train.seed={seed}", f"select.seed={seed}"]
    own += [f"data.digits.seed={seed}"] if options.recipe == "digits" else []
    scale = ["--scale", options.scale] if options.scale else []
    line = [options.recipe, *own, *options.overrides, *scale, "--store", store, "--prefect", "off"]
    subprocess.run([sys.executable, "-m", "flows.cli", "run", *line], check=True, stdout=sys.stderr)
    line = [sys.executable, "-m", "flows.cli", "results", name, "--json", "--store", store]
    records: list[dict[str, Any]] = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    return records


def mean_and_error(gains: list[float]) -> str:
    """`+1.50 +- 0.20`: the mean of the seeds and its standard error."""
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return f"{statistics.mean(gains):+.2f} +- {error:.2f}"


def show(runs: Runs, field: str, what: str) -> None:
    """One table: a network a row, a seed a column."""
    values = [[100 * run[place][field] for run in runs] for place in range(len(runs[0]))]
    seeds = "  ".join(f"seed {seed}" for seed in range(len(runs)))
    print(f"{what + ' top-1, %':<22}{seeds}    mean  over the teacher  over the one before")
    for place, record in enumerate(runs[0]):
        over = [
            mean_and_error([own - other for own, other in zip(values[place], others, strict=True)])
            for others in ((values[0], values[place - 1]) if place else ())
        ]
        row = "  ".join(f"{value:6.2f}" for value in values[place])
        name = f"{record['iteration']}/{record['role']}"
        print(f"{name:<22}{row}  {statistics.mean(values[place]):6.2f}  {'  '.join(f'{o:>16}' for o in over)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--scale", default="")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="show validation alone")
    parser.add_argument("--store", default="", help="keep the artifacts here; a repeated call goes on where it was")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nst-gain-") as folder:
        runs = [run_seed(options, options.store or folder, seed) for seed in range(options.seeds)]
    show(runs, "val_top1", "validation")
    if not options.tune:
        show(runs, "top1", "test")
    if len(runs) >= 5 and statistics.mean(run[-1]["top1"] - run[0]["top1"] for run in runs) <= 0:
        sys.exit("the last student is not better than the teacher on average")


if __name__ == "__main__":
    main()
