"""What a Ray cluster costs and gives: labeling with two workers against one, and the time a piece takes besides its work.

python -m benchmarks.ray_cluster [--images 1500] [--pieces 60] [--repeats 3] [--photos ../shared/data/photos.parquet]

Nodes of one core each, all on this machine, so two of them compete as two processes do: those are timed beside them, without
Ray. The label stage runs from tars to Parquet, EfficientNet-Lite0 at 224 px, eager float32; its processes start anew each
time, on both sides. Then pieces that do nothing: in children of this process, as plain Ray tasks, and as task runs of a
Prefect server on this machine. Prints medians, spread, and the ratios turn by turn.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos.parquet"
SHARD_IMAGES = 500
NAMES = ("one process", "two processes", "one node", "two nodes")
NOTHING = "benchmarks.ray_cluster:nothing"


def nothing(spec: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: a piece without work."""
    return {}


class Nodes:
    """A cluster whose head has one core; another node of one core comes and goes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self._other: Any = None

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def be(self, count: int) -> None:
        """Have one or two nodes, and wait until Ray counts so many."""
        import ray

        if count == 2 and self._other is None:
            self._other = self._cluster.add_node(num_cpus=1)
        elif count == 1 and self._other is not None:
            self._cluster.remove_node(self._other)
            self._other = None
        while ray.is_initialized() and ray.cluster_resources().get("CPU", 0) != count:
            time.sleep(0.2)

    def end(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


def labeling(folder: Path, photos: Path, images: int) -> Callable[[Any], float]:
    """A function that labels all images anew with an engine; its result: images a second."""
    import shutil

    from benchmarks.labeling import write_data_set, write_model
    from models.configs import LabelConfig
    from storage.keys import digest
    from storage.objects import Store
    from tasks.contract import StageContext
    from tasks.label import label

    store = Store(str(folder / "store"))
    data = write_data_set(store, [row["bytes"] for row in pq.read_table(photos)["image"].to_pylist()], images, "photos")
    inputs = {"data": data, "model": write_model(store)}

    def rate(engine: Any) -> float:
        shutil.rmtree(folder / "store" / "parts", ignore_errors=True)
        context = StageContext(store, digest(time.time_ns()), engine, engine.config)
        started = time.perf_counter()
        label(context, LabelConfig(), inputs)
        return images / (time.perf_counter() - started)

    return rate


def throughput(options: argparse.Namespace, nodes: Nodes, folder: Path) -> None:
    """Print what two workers label against one."""
    from models.compute import ComputeConfig, LocalEngine
    from models.ray_engine import RayEngine

    rate = labeling(folder, options.photos, options.images)
    common = {"dtype": "float32", "compile": "never", "task_images": SHARD_IMAGES}
    own = {name: ComputeConfig(processes=count, **common) for count, name in ((1, NAMES[0]), (2, NAMES[1]))}
    cluster = ComputeConfig(engine="ray", ray_address=nodes.address, **common)
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    RayEngine(cluster)
    for _ in range(options.repeats):
        for name in NAMES:
            if name in own:
                engine: Any = LocalEngine(own[name])
                engine.config = own[name]
            else:
                nodes.be(1 if name == "one node" else 2)
                engine = RayEngine(cluster)
                engine.config = cluster
            rates[name].append(rate(engine))
        print({name: round(found[-1], 1) for name, found in rates.items()}, flush=True)
    for name, found in rates.items():
        print(f"{name}: {statistics.median(found):.1f} images/s ({min(found):.1f}-{max(found):.1f})")
    for one, two in ((NAMES[0], NAMES[1]), (NAMES[2], NAMES[3]), (NAMES[1], NAMES[3])):
        print(f"{two} against {one}: {_ratio(rates[two], rates[one])}")


def overhead(options: argparse.Namespace, nodes: Nodes) -> None:
    """Print what a piece costs besides its work."""
    from models.compute import ComputeConfig, LocalEngine
    from models.ray_engine import RayEngine

    nodes.be(2)
    specs: list[dict[str, Any]] = [{} for _ in range(options.pieces)]
    cluster = ComputeConfig(engine="ray", ray_address=nodes.address)

    def seconds(engine: Any) -> float:
        engine.map(NOTHING, specs[:4], lambda progress: None)  # what is started once is started
        started = time.perf_counter()
        engine.map(NOTHING, specs, lambda progress: None)
        return (time.perf_counter() - started) * 2 / len(specs)

    from prefect import flow

    from flows.ray_task_runs import offer_task_runs

    @flow
    def seen_by_prefect() -> float:
        return seconds(RayEngine(cluster, lambda line: None, offer_task_runs))

    found: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        found.setdefault("children of this process", []).append(seconds(LocalEngine(ComputeConfig(processes=2))))
        found.setdefault("plain Ray tasks", []).append(seconds(RayEngine(cluster)))
        found.setdefault("task runs of Prefect on Ray", []).append(seen_by_prefect())
    print(f"a piece without work, two at a time ({options.pieces} pieces):")
    for name, times in found.items():
        print(f"{name}: {statistics.median(times):.2f} s ({min(times):.2f}-{max(times):.2f})")


def _ratio(own: list[float], other: list[float]) -> str:
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--pieces", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name:
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", PREFECT_HOME=f"{name}/prefect", PREFECT_LOGGING_LEVEL="ERROR")
        from flows.embedded import EmbeddedApi

        api = EmbeddedApi()
        nodes = Nodes()
        try:
            throughput(options, nodes, Path(name))
            api.wait()
            overhead(options, nodes)
        finally:
            nodes.end()
            api.stop()


if __name__ == "__main__":
    main()
