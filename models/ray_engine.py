"""The compute seam on an existing Ray cluster: `map` as Ray tasks, `gang` as actors of one placement group.

A piece runs where Ray puts it, as a child process of the Ray worker (models/launch.py), so that it is the same function in
the same kind of process as on one machine. Every node needs this package, the packages it needs, and the store.

Imported only where `compute.engine` is `ray` (extra `ray`).
"""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from models.compute import ComputeConfig, OfferPieces, OnProgress, Pieces, Spec, Totals
from models.failures import WorkerFailed, WorkerLost
from models.heard import Record
from models.launch import GRACE_S, Place, free_port, run_worker
from models.numerics import resolve_device
from storage.errors import StoreAway, UserError, explained

POLL_S = 0.3
LOOK_S = 10.0
PLACE_S = 60.0  # the resources of a cluster may be taken by others for a moment
RANK_CALLS = 2  # at once: it can be asked to stop while it runs
NODE_LOSSES = 5  # so often a piece is begun again on another node
NAMESPACE = "noisy-student"
ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, StoreAway, WorkerFailed, WorkerLost)
}  # what crosses between nodes by name


class RayPieces:
    """Plain Ray tasks."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def submit(self, name: str, number: int, function: str, spec: Spec, board: Any) -> Any:
        """Hand a piece to Ray; what `ray.wait` takes."""
        return run_piece.options(**self._options, name=name).remote(number, function, spec, board)

    def outcome(self, value: Any) -> dict[str, Any]:
        """It is what `run_here` returned."""
        found: dict[str, Any] = value
        return found


class _Board:
    """Where pieces leave what they report, and their driver picks it up."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._lines: list[str] = []

    def report(self, number: int, record: Record) -> None:
        """The newest progress of a piece."""
        self._records[number] = record

    def log(self, line: str) -> None:
        """A line of a piece's log."""
        self._lines.append(line)

    def take(self) -> tuple[dict[int, Record], list[str]]:
        """What is new."""
        found = self._records, self._lines
        self._records, self._lines = {}, []
        return found


def run_here(
    number: int,
    function: str,
    spec: Spec,
    board: Any,
    on_log: Callable[[str], None] = lambda line: None,
    **how: Any,
) -> dict[str, Any]:
    """Run a piece in a child of this process: {"result": ...}, or {"error": its class, "message", "time"}.

    What it reports and logs goes to the driver's board, its log to `on_log` too.
    """

    def log(line: str) -> None:
        board.log.remote(line)
        on_log(line)

    if "gpu" in spec:  # the driver counts its own machine's; Ray shows a worker those that are its
        spec = {**spec, "gpu": 0}
    try:
        result = run_worker(
            function,
            spec,
            on_record=lambda record: board.report.remote(number, record),
            on_log=log,
            **how,
        )
    except Exception as caught:
        error = explained(caught) or caught
        kind = next((k for k in type(error).__mro__ if k.__name__ in ERRORS), WorkerFailed)
        return {"error": kind.__name__, "message": str(error), "time": time.time()}
    return {"result": result}


run_piece: Any = ray.remote(run_here)
Board: Any = ray.remote(_Board)


class _Rank:
    """One rank of a gang, in its bundle of the placement group."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def meeting_point(self) -> tuple[str, int]:
        """An address of this node where the ranks can meet."""
        return get_node_ip_address(), free_port("")

    def run(self, place: Place, threads: int, function: str, spec: Spec, board: Any) -> dict[str, Any]:
        """As `run_here`, as the rank that `place` says."""
        return run_here(place.rank, function, spec, board, threads=threads, place=place, stop=self._stop)

    def stop(self) -> None:
        """Ask it to stop: it writes a checkpoint first."""
        self._stop.set()


Rank: Any = ray.remote(_Rank)


class RayEngine:
    """An existing cluster. The pieces of `map` may move to another node when theirs dies; a gang ends with any of its nodes."""

    def __init__(
        self,
        config: ComputeConfig,
        on_log: Callable[[str], None] = lambda line: None,
        offer: OfferPieces | None = None,
    ) -> None:
        """`offer`: how else than as plain Ray tasks pieces may be handed out."""
        self._config, self._on_log, self._offer = config, on_log, offer
        connect(config)

    @property
    def processes(self) -> int:
        """How many pieces the cluster's nodes run at once."""
        return self._config.processes or max(1, int(ray.cluster_resources().get(self._unit, 0)))

    def check(self, store: str) -> None:
        """Raise UserError where a training's ranks have no room on the cluster, or its machines cannot reach the store."""
        room_for(self._bundle, self._config.ranks)
        machines = _machines()
        if store.startswith("file:") and len(machines) > 1:
            raise UserError(
                f"store {store} is a folder, and the Ray cluster has {len(machines)} machines; use a store that all of them "
                "reach (s3://bucket/prefix)"
            )

    def map(self, function: str, specs: Sequence[Spec], on_progress: OnProgress) -> list[dict[str, Any]]:
        """A Ray task a spec; one that a dead node had is run again on another."""
        totals = Totals(len(specs), on_progress)
        with self._board(totals) as board, self._pieces() as pieces:
            refs = [
                pieces.submit(_name(function, number), number, function, spec, board)
                for number, spec in enumerate(specs)
            ]
            try:
                found = self._wait(refs, board, totals, pieces.outcome)
            except BaseException:
                for ref in refs:
                    ray.cancel(ref, force=False)
                raise
        return [one["result"] for one in found]

    def gang(self, function: str, spec: Spec, world: int, on_progress: OnProgress) -> dict[str, Any]:
        """`world` actors in one placement group, packed on as few nodes as have room; each starts its rank as a child."""
        totals, bundle = Totals(1, on_progress), self._bundle
        threads = int(bundle["CPU"])
        with self._board(totals) as board, placed(bundle, world) as group:
            options = {"num_cpus": threads, "num_gpus": bundle.get("GPU", 0), "max_concurrency": RANK_CALLS}
            ranks = [
                Rank.options(**options, scheduling_strategy=PlacementGroupSchedulingStrategy(group, number)).remote()
                for number in range(world)
            ]
            address, port = ray.get(ranks[0].meeting_point.remote())
            places = [Place(number, world, address, port) for number in range(world)]
            refs = [
                rank.run.remote(place, threads, function, spec, board)
                for rank, place in zip(ranks, places, strict=True)
            ]
            try:
                found = self._wait(refs, board, totals, lambda value: value)
            except BaseException:
                for rank in ranks:
                    rank.stop.remote()
                with suppress(RayError):
                    ray.wait(refs, num_returns=len(refs), timeout=GRACE_S)
                raise
        result: dict[str, Any] = found[0]["result"]
        return result

    @property
    def _unit(self) -> str:
        return "GPU" if resolve_device(self._config) == "cuda" else "CPU"

    @property
    def _bundle(self) -> dict[str, float]:
        """What one rank needs."""
        gpu = {"GPU": 1.0} if self._unit == "GPU" else {}
        return {"CPU": float(self._config.threads or 1), **gpu}

    @contextmanager
    def _pieces(self) -> Iterator[Pieces]:
        """How pieces are handed out."""
        options = {"num_cpus": 1, "num_gpus": int(self._unit == "GPU"), "max_retries": NODE_LOSSES}
        if self._offer is None or self._config.ray_task_runs == "never":
            yield RayPieces(options)
            return
        alone = _machines() == {get_node_ip_address()}
        with self._offer(options, alone, self._on_log) as offered:
            yield offered or RayPieces(options)

    @contextmanager
    def _board(self, totals: Totals) -> Iterator[Any]:
        """A board on this driver's node, which the pieces' progress reaches."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board = Board.options(num_cpus=0, scheduling_strategy=here).remote()
        try:
            yield board
            self._read(board, totals)
        finally:
            with suppress(RayError):
                ray.kill(board)

    def _read(self, board: Any, totals: Totals) -> None:
        """Hand on what the pieces have reported. Without effect where the board's node has died: nobody sees progress then."""
        with suppress(GetTimeoutError, RayActorError):
            records, lines = ray.get(board.take.remote(), timeout=10 * POLL_S)
            for line in lines:
                self._on_log(line)
            for number, record in records.items():
                totals.listener(min(number, totals.size - 1))(record)

    def _wait(
        self, refs: Sequence[Any], board: Any, totals: Totals, read: Callable[[Any], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The results of all. Raises the error of the piece that failed first, as soon as one has."""
        waiting = list(refs)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_S, num_returns=len(waiting))
            self._read(board, totals)
            failed = [found for found in (_outcome(ref, read) for ref in done) if "error" in found]
            if failed:
                first = min(failed, key=lambda found: float(found["time"]))
                raise ERRORS[first["error"]](first["message"])
        return [_outcome(ref, read) for ref in refs]


def connect(config: ComputeConfig) -> None:
    """Join the cluster, once a process. Raises UserError where there is none."""
    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _look(config.ray_address)
        ray.init(config.ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"compute.engine=ray: no Ray cluster at compute.ray_address={config.ray_address} ({str(error).splitlines()[0]}); "
            "start one (`ray start --head`), name its address, or set compute.engine=local"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, on_sigterm
        )  # Ray has put its own in place, which asks no training for a checkpoint


def _look(address: str) -> None:
    """Raise OSError where nobody listens at an address: Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), LOOK_S).close()


def room_for(bundle: dict[str, float], world: int) -> None:
    """Raise UserError where the cluster is too small for `world` ranks."""
    wanted = {name: amount * world for name, amount in bundle.items()}
    there = ray.cluster_resources()
    short = [name for name, amount in wanted.items() if there.get(name, 0) < amount]
    if short:
        raise UserError(
            f"compute.ranks={world} needs {', '.join(f'{wanted[n]:g} {n}s' for n in short)} of the Ray cluster, which has "
            f"{', '.join(f'{there.get(n, 0):g}' for n in short)}; lower compute.ranks or compute.threads, or add nodes"
        )


@contextmanager
def placed(bundle: dict[str, float], world: int) -> Iterator[PlacementGroup]:
    """Room for `world` ranks. Raises UserError where the cluster is too small, WorkerLost where it is busy."""
    room_for(bundle, world)
    group = placement_group([bundle] * world, strategy="PACK")
    try:
        if not group.wait(PLACE_S):
            raise WorkerLost(f"the Ray cluster had no room for {world} ranks in {PLACE_S:.0f} s; run again")
        yield group
    finally:
        remove_placement_group(group)


def _machines() -> set[str]:
    """The addresses of the cluster's machines."""
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _outcome(ref: Any, read: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What a piece came to; a node's death is its loss."""
    try:
        found = read(ray.get(ref))
    except RayError as error:
        why = str(error).strip().splitlines()
        return {
            "error": "WorkerLost",
            "message": f"Ray lost a node or worker: {why[0] if why else error!r}",
            "time": time.time(),
        }
    return found


def _name(function: str, number: int) -> str:
    return f"{function.rpartition(':')[2]} {number}"
