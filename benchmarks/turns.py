"""Contenders of a benchmark that take turns: each is set up once, in a process of its own, and sleeps while another is timed."""

import json
import os
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from models.compute import num_cores
from models.launch import run_worker
from models.memory import HUGE_PAGES, TUNABLES


class Turns:
    """Contenders take turns, each in its process: warm, set up once, and asleep while another one is timed.

    The benchmark's process and theirs meet in a folder: NAME.N.go says that turn N of NAME begins, NAME.N.json what it gave.
    """

    def __init__(self, folder: str, name: str, warm: int, seconds: float) -> None:
        """`warm`: steps at the beginning of a turn that are not timed, above all of batches made while it slept."""
        self._place, self._warm, self._seconds = f"{folder}/{name}", warm, seconds
        self._started, self._turn, self._steps = time.perf_counter(), -1, 0
        self._begin, self._images = 0.0, 0

    def after_step(self, images: int) -> bool:
        """Count a finished step of so many images; False where there is no further turn."""
        if self._turn < 0:
            return self._next({"setup_s": time.perf_counter() - self._started})
        self._steps += 1
        if self._steps == self._warm:
            self._begin, self._images = time.perf_counter(), 0
        elif self._steps > self._warm:
            self._images += images
            if (passed := time.perf_counter() - self._begin) > self._seconds:
                return self._next({"rate": self._images / passed})
        return True

    def _next(self, found: dict[str, float]) -> bool:
        said = Path(f"{self._place}.{self._turn}.json")
        said.with_suffix(".tmp").write_text(json.dumps(found))
        said.with_suffix(".tmp").rename(said)
        self._turn, self._steps = self._turn + 1, 0
        while not (end := Path(f"{self._place}.end")).exists():
            if Path(f"{self._place}.{self._turn}.go").exists():
                return True
            time.sleep(0.02)
        return not end.exists()


def turns_of(job: dict[str, Any]) -> Turns:
    return Turns(job["turns"], job["contender"], job["warm"], job["seconds"])


def run(function: str, job: dict[str, Any], world: int = 1) -> dict[str, Any]:
    """A worker function, `module:name`, in processes of its own; what the probe says is printed."""
    said: list[str] = []
    found = run_worker(function, job, world=world, threads=num_cores() // world, on_log=said.append)
    for line in said:
        if line.startswith("probe:"):
            print(line, flush=True)
    return found


class Contender:
    """A worker function that was set up and waits for its turns. It calls `turns_of(job).after_step` after each step."""

    def __init__(
        self, folder: Path, name: str, function: str, job: dict[str, Any], world: int = 1, huge_pages: bool = True
    ) -> None:
        self._place, self._turn = folder / name.replace(" ", "-"), 0
        self.rates: list[float] = []
        os.environ[TUNABLES] = f"{HUGE_PAGES}={int(huge_pages)}"
        spec = {**job, "turns": str(folder), "contender": self._place.name, "key": uuid.uuid4().hex}
        self._pool = ThreadPoolExecutor(1)
        self._running = self._pool.submit(run, function, spec, world)
        self.setup_s = self._said(-1)["setup_s"]

    def turn(self) -> float:
        """Images a second of one more turn."""
        Path(f"{self._place}.{self._turn}.go").touch()
        self.rates.append(self._said(self._turn)["rate"])
        self._turn += 1
        return self.rates[-1]

    def end(self) -> None:
        """Stop its processes. Raises what they failed of."""
        Path(f"{self._place}.end").touch()
        self._running.result()
        self._pool.shutdown()

    def _said(self, turn: int) -> dict[str, float]:
        while not (place := Path(f"{self._place}.{turn}.json")).exists():
            if self._running.done():
                self._running.result()
                sys.exit(f"{self._place.name} ended before its turn")
            time.sleep(0.05)
        found: dict[str, float] = json.loads(place.read_text())
        return found
