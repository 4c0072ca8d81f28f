"""The compute seam: `map` for independent pieces of work, `gang` for ranks that work together.

Both take a function's name and JSON specs (with the store's URL in them): no closures or open handles cross, so that
another engine can run the same functions on other machines.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from models.heard import Record
from models.launch import run_worker
from models.meeting import Meeting
from storage.errors import UserError
from storage.keys import Config

MOST_LOADERS = 16  # a rank
Spec = dict[str, Any]
OnProgress = Callable[[dict[str, Any]], None]
OnLog = Callable[[str], None]


class ComputeConfig(Config):
    """Where and how fast the work runs. Nothing here enters a key: results do not depend on it."""

    engine: Literal["local", "ray"] = Field("local", description="ray: an existing Ray cluster (extra `ray`)")
    ray_address: str = Field(
        "auto",
        description="of the cluster with engine=ray: host:port, ray://host:10001; auto: this machine's, or RAY_ADDRESS",
    )
    ray_task_runs: Literal["auto", "never"] = Field(
        "auto",
        description="whether each piece that a Ray cluster works on is a task run in Prefect (prefect-ray); auto: where the "
        "run has a Prefect API which the cluster's machines reach",
    )
    processes: int = Field(0, ge=0, description="worker processes of map; 0: one a core, or one a GPU for inference")
    ranks: int = Field(1, ge=1, description="DDP processes of a training; must divide train.replicas")
    nodes: int = Field(
        1,
        ge=1,
        description="machines that share the ranks of a training; on all but the first runs `nst join` (not with Ray)",
    )
    rdzv_endpoint: str = Field(
        "",
        description="with several nodes: host:port of the first, where the others find it; no other program has the port",
    )
    threads: int = Field(0, ge=0, description="torch threads of each DDP rank; 0: cores / ranks of a machine")
    loader_workers: int = Field(
        -1,
        ge=-1,
        description="processes that decode and noise images, a rank; 0: the training process itself; -1: beside a GPU a "
        "rank's share of the cores, on a CPU two (one with several ranks), which yield to the training",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where labeling is long enough and the hardware computes in it, else float32"
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile for labeling; auto: where the job is long enough to pay for it"
    )
    inference_batch: int = Field(
        0, ge=0, description="images of an inference batch, the last one is padded to it; 0: 16, on a GPU 256"
    )
    task_images: int = Field(
        2000,
        ge=1,
        description="images that are worth a process of their own, at least; a quarter of them where they are labeled",
    )
    shards_per_task: int = Field(16, ge=1, description="shards that one process takes at once, at most")
    train_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of a training; auto: measured before the first step where the training is long, else float32",
    )
    train_layout: Literal["auto", "channels_last", "contiguous"] = Field(
        "auto", description="of a training's images and weights in memory; auto: as train_dtype, else channels_last"
    )
    train_compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile for training; auto: as train_dtype, else not"
    )
    checkpoint_steps: int = Field(500, ge=1, description="training steps between two checkpoints, at most")
    checkpoint_seconds: float = Field(
        60.0, gt=0, description="between two checkpoints; more where that would cost over a fiftieth of the time"
    )
    kept_checkpoints: int = Field(2, ge=1, description="newest checkpoints that an attempt keeps")
    retries: int = Field(
        3,
        ge=0,
        le=50,
        description="so often a stage is tried again where its store does not answer or a process of it was killed, after "
        "10 s, 40 s, 160 s and so on; it goes on where it was",
    )
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",), description="where a training's numbers go besides console and artifact"
    )
    log_folder: str = Field(
        "", description="of TensorBoard's event files; empty: `logs` in a store on disk, else in the cache's folder"
    )

    @model_validator(mode="after")
    def _nodes_meet(self) -> Self:
        if self.nodes == 1:
            return self
        if self.engine == "ray":
            raise ValueError(f"nodes={self.nodes}: with engine=ray the cluster says where ranks run; leave nodes out")
        if self.ranks % self.nodes:
            raise ValueError(f"nodes={self.nodes} does not divide ranks={self.ranks}; every machine has as many ranks")
        if not self.rdzv_endpoint:
            raise ValueError(
                f"nodes={self.nodes} needs rdzv_endpoint=HOST:PORT, an address of this machine that the others reach"
            )
        Meeting.at(self.rdzv_endpoint)  # raises where it is none
        return self

    @property
    def meeting(self) -> Meeting | None:
        """Where the machines of a training meet; None for a training on this machine alone."""
        return Meeting.at(self.rdzv_endpoint, self.nodes) if self.nodes > 1 else None

    @property
    def local_ranks(self) -> int:
        """Ranks of a training on each machine."""
        return self.ranks // self.nodes


class Engine(Protocol):
    """The calls that every engine offers."""

    @property
    def processes(self) -> int:
        """How many pieces of work `map` does at once."""
        ...

    def check(self, store: str) -> None:
        """Raise UserError where the work has no place to run, or that cannot reach the store; before anything starts."""

    def map(self, function: str, specs: Sequence[Spec], on_progress: OnProgress) -> list[dict[str, Any]]:
        """Run `function` on each spec, in any order and in parallel; results in the order of the specs."""
        ...

    def gang(self, function: str, spec: Spec, world: int, on_progress: OnProgress) -> dict[str, Any]:
        """Run `function` in `world` ranks that may speak to each other; rank 0's result."""
        ...


class Pieces(Protocol):
    """How the pieces of one `map` are handed to a cluster."""

    def submit(self, name: str, number: int, function: str, spec: Spec, board: Any) -> Any:
        """Hand one out. Returns what the cluster's library waits for."""
        ...

    def outcome(self, value: Any) -> dict[str, Any]:
        """A piece's result or error, from what the cluster returned."""
        ...


# what pieces need of the cluster, whether it is this machine alone, who is told why not -> pieces, or None where it cannot be
OfferPieces = Callable[[dict[str, Any], bool, OnLog], AbstractContextManager[Pieces | None]]


class LocalEngine:
    """This machine: a pool of child processes for `map`, torch elastic for `gang`."""

    def __init__(self, config: ComputeConfig, on_log: OnLog = lambda line: None) -> None:
        self._config = config
        self._on_log = on_log

    def check(self, store: str) -> None:
        """Raise UserError where other machines are to train from a folder of this one."""
        meeting = self._config.meeting
        if meeting and not meeting.on_loopback and store.startswith("file:"):
            raise UserError(
                f"store {store} is a folder, and compute.nodes={meeting.machines} machines train together; use a store that "
                "all of them reach (s3://bucket/prefix)"
            )

    def map(self, function: str, specs: Sequence[Spec], on_progress: OnProgress) -> list[dict[str, Any]]:
        """One child a spec, `compute.processes` at a time, each with one thread (threads change bits)."""
        totals = Totals(len(specs), on_progress)
        stop = threading.Event()

        def run(number: int) -> dict[str, Any]:
            return run_worker(
                function, specs[number], on_record=totals.listener(number), on_log=self._on_log, stop=stop
            )

        with ThreadPoolExecutor(self.processes) as pool:
            futures = [pool.submit(run, number) for number in range(len(specs))]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # a failure or Ctrl-C ends the others too
                stop.set()
                for future in futures:
                    future.cancel()
        for future in done:
            future.result()  # raises the first failure, not those of the children that it ended
        return [future.result() for future in futures]

    def gang(self, function: str, spec: Spec, world: int, on_progress: OnProgress) -> dict[str, Any]:
        """`world` ranks of this machine, or of all that meet; one rank runs without an agent."""
        meeting = self._config.meeting
        threads = self._config.threads or max(1, num_cores() // self._config.local_ranks)
        if meeting:
            self._on_log(
                f"waits for {meeting.machines - 1} more machines: run `nst join {self._config.rdzv_endpoint}` there"
            )
        return run_worker(
            function,
            spec,
            world=world,
            threads=threads,
            meeting=meeting,
            on_record=Totals(1, on_progress).listener(0),
            on_log=self._on_log,
        )

    @property
    def processes(self) -> int:
        """How many children `map` runs at once."""
        return self._config.processes or num_cores()


def open_engine(config: ComputeConfig, on_log: OnLog = lambda line: None, offer: OfferPieces | None = None) -> Engine:
    """The engine that a config asks for. Raises UserError where Ray is asked for and is not there.

    `offer`: how a cluster's pieces may be handed out so that someone else sees them.
    """
    if config.engine == "local":
        return LocalEngine(config, on_log)
    try:
        from models.ray_engine import RayEngine
    except ImportError as error:
        raise UserError(f"compute.engine=ray needs the extra `ray` ({error}): pip install '.[ray]'") from error
    return RayEngine(config, on_log, offer)


def group_shards(
    images: Sequence[int], processes: int, config: ComputeConfig, most: int | None = None, worth: int | None = None
) -> list[range]:
    """Cut a list of shards (their image counts) into consecutive groups, each one spec of `map`.

    As many groups as there are processes, but none for fewer than `worth` images (None: `task_images`), because a process
    takes a moment to start, and none with more than `most` shards (None: `shards_per_task`).
    """
    if not images:
        return []
    wanted = max(1, min(processes, sum(images) // (worth or config.task_images)))
    size = min(config.shards_per_task if most is None else most, -(-len(images) // wanted))
    return [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]


def loader_processes(config: ComputeConfig, device: str) -> int:
    """How many processes make the batches of one rank on this machine."""
    if config.loader_workers >= 0:
        return config.loader_workers
    share = num_cores() // config.local_ranks
    return max(1, min(MOST_LOADERS, share - 1)) if device == "cuda" else max(1, min(2, share))


def num_gpus() -> int:
    """GPUs that this process may use, by their device files: without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(visible.split(",")) if visible else len(list(Path("/dev").glob("nvidia[0-9]*")))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Totals:
    """Adds up the progress of several children."""

    def __init__(self, num: int, on_progress: OnProgress) -> None:
        self.size = num
        self._latest: list[dict[str, Any]] = [{} for _ in range(num)]
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def listener(self, number: int) -> Callable[[Record], None]:
        """What takes the records of one child."""

        def listen(record: Record) -> None:
            progress = record.get("progress")
            if progress is None:
                return
            with self._lock:
                self._latest[number] = progress
                sums = {field: sum(p.get(field, 0) for p in self._latest) for field in ("done", "total")}
                self._on_progress({**progress, **sums})

        return listen
