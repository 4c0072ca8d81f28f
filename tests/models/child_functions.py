"""Functions that the tests run in child processes, as `models.worker` calls them. Without torch unless they train."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from models.worker import Stopped, Worker
from storage.errors import StoreAway, UserError


def report(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Say what this process knows, and make noise of every kind."""
    print("a line of a library")
    print("a warning of a library", file=sys.stderr)
    print("@nst {this is no record", flush=True)
    worker.progress(3, 4, last=True)
    names = ("OMP_NUM_THREADS", "PYTHONSAFEPATH")
    return {"pid": os.getpid(), "spec": spec, "threads": worker.threads, **{n: os.environ.get(n) for n in names}}


def sleep(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Mark the start of each process by a file of its id, then sleep until asked to stop."""
    _mark(spec)
    deadline = time.monotonic() + spec.get("seconds", 300)
    while time.monotonic() < deadline:
        if worker.stop_requested:
            raise Stopped
        time.sleep(0.05)
    return {"number": spec.get("number")}


def finish_later(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Results come back in another order than the specs' where earlier ones sleep longer."""
    worker.progress(spec["number"], 10, last=True)
    time.sleep(spec["seconds"])
    if spec.get("error"):
        worker.at("shards/train/00003.tar")
        raise ValueError(f"spec {spec['number']} fails")
    return {"number": spec["number"]}


def fail_or_sleep(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """The spec that is to fail does so once the others run; these sleep."""
    if spec["error"]:
        while len(list(Path(spec["folder"]).iterdir())) < spec["others"]:
            time.sleep(0.05)
        raise ValueError(f"spec {spec['number']} fails")
    return sleep(spec, worker)


def fail_in_rank(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Rank 1 raises once all ranks run; the others wait for it."""
    _mark(spec)
    while len(list(Path(spec["folder"]).iterdir())) < worker.world:
        time.sleep(0.05)
    if worker.rank == 1:
        raise RuntimeError("rank 1 cannot go on")
    return sleep({**spec, "seconds": 300}, worker)


def refuse(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Bad input of the user's."""
    raise UserError("select.min_confidence=2 is above 1; lower it")


def vanish(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """End without a result or an error, as a process does that is killed for its memory."""
    worker.at("shards/train/00007.tar")
    print("the last words", flush=True)
    os._exit(9)


def die(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """End by a signal, in the middle of a shard."""
    worker.at("shards/train/00007.tar")
    print("the last words", flush=True)
    os.kill(os.getpid(), spec["signal"])
    return sleep({"seconds": 300}, worker)


def die_in_collective(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Rank 1 is killed while rank 0 waits for it in an all-reduce."""
    import torch
    import torch.distributed as dist

    _mark(spec)
    dist.init_process_group("gloo")
    dist.barrier()
    worker.at("step 3")
    if worker.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(3))
    return {}


def find_the_store_away(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """A bucket's server that is overloaded."""
    raise StoreAway("s3://bucket: object a: SlowDown")


def train_all(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Several trainings in one gang, because starting ranks takes longer than these trainings."""
    import torch
    import torch.distributed as dist

    from models.training import Trainer

    torch.set_num_threads(worker.threads)
    dist.init_process_group("gloo")
    try:
        return {"results": [Trainer(one, worker).run() for one in spec["trainings"]]}
    finally:
        dist.destroy_process_group()


def train_marked(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """A training whose processes are known by files of their ids."""
    from models.training import train

    _mark(spec)
    return train(spec["training"], worker)


def _mark(spec: dict[str, Any]) -> None:
    if "folder" in spec:
        (Path(spec["folder"]) / str(os.getpid())).touch()
