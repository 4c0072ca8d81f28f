"""The demo's gain over several seeds: is the student better than its teacher, on average?

    .venv/bin/python benchmarks/demo_gain.py --seeds 5 [a.b=c ...]

Runs the digits recipe once a seed (the seed of splits, networks, order and noise) in one store, and prints top-1 of
teacher and students on the validation and the test images, the mean gain and its standard error. Settings are chosen on the
validation column.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile


def run_seed(store: str, seed: int, overrides: list[str]) -> list[dict]:
    """One experiment; its result records."""
    name = f"digits-seed{seed}"
    own = [f"name={name}", f"train.seed={seed}", f"data.digits.seed={seed}", f"select.seed={seed}", *overrides]
    options = ["--store", store, "--prefect", "off"]
    subprocess.run([sys.executable, "-m", "flows.cli", "run", "digits", *own, *options], check=True, stdout=sys.stderr)
    line = [sys.executable, "-m", "flows.cli", "results", name, "--json", "--store", store]
    records: list[dict] = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--store", default="", help="keep the artifacts here; a repeated call goes on where it was")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nst-gain-") as folder:
        runs = [run_seed(arguments.store or folder, seed, arguments.overrides) for seed in range(arguments.seeds)]
    names = [f"{record['iteration']}/{record['role']}" for record in runs[0]]
    for field, what in (("val_top1", "validation"), ("top1", "test")):
        print(f"{what} top-1, %      " + "  ".join(f"seed {seed}" for seed in range(len(runs))) + "    mean   gain")
        for place, name in enumerate(names):
            values = [100 * run[place][field] for run in runs]
            gains = [100 * (run[place][field] - run[0][field]) for run in runs]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
            gain = f"{statistics.mean(gains):+.2f} +- {error:.2f}" if place else ""
            print(
                f"{name:<20}"
                + "  ".join(f"{value:6.2f}" for value in values)
                + f"  {statistics.mean(values):6.2f}  {gain}"
            )
    if len(runs) >= 5 and statistics.mean(run[-1]["top1"] - run[0]["top1"] for run in runs) <= 0:
        sys.exit("the last student is not better than the teacher on average")


if __name__ == "__main__":
    main()
