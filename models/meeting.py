"""Machines that train together without a scheduler: torch elastic on each, which meet at an endpoint of the first.

The first machine runs the experiment. For each training its elastic agent serves torch's key-value store at the endpoint
and leaves the work there; the others (`nst join HOST:PORT`) take it, and their agents start its ranks. So no folder is
shared and nothing is said twice. Whoever reaches the endpoint can join, or hand out work: keep it inside the cluster.

A training has as many machines as it was started for: where one is lost all stop, and the run goes on from its checkpoint.
"""

import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from models.versions import package_versions
from storage.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import PrefixStore

NAMES = "nst"  # of our keys; the agents' own begin with the job's id
WAIT_S = 1800  # the first for the others, which may be started by hand
ANSWER_S = 10
POLL_S = 1.0
PACKAGES = ("torch", "torchvision", "timm")
TOLD_S = 3.0  # a machine sees that another has gone before that one has said why
TELL = "NST_TELL"  # in a joined rank's environment: where it says why it failed

Job = dict[str, Any]


@dataclass(frozen=True)
class Meeting:
    """How many machines meet where. `after`: the job that a machine had before, which it does not take again."""

    machines: int
    host: str
    port: int
    first: bool = True
    after: str = ""

    @classmethod
    def at(cls, endpoint: str, machines: int = 0, *, first: bool = True, after: str = "") -> "Meeting":
        """`host:port`. Raises ValueError for anything else."""
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ValueError(f"{endpoint!r} is not HOST:PORT, an address of the first machine")
        return cls(machines, host, int(port), first, after)

    @property
    def on_loopback(self) -> bool:
        """Whether all of it happens on one machine."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def pinned(threads: int) -> dict[str, str]:
    """The environment of a process that computes with so many threads."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def arrive(job: Job) -> tuple[Job, list[str], Any]:
    """Meet, as the job's `meeting` says: leave the job there, or take the one that is there, however long that takes.

    Returns the job, the arguments of torchrun that make this process an agent of it, and the store, which the first
    machine has to keep until its agent has ended.
    """
    meeting = Meeting(**job["meeting"])
    if meeting.first:
        job = {**job, "id": uuid.uuid4().hex, "packages": package_versions(PACKAGES)}
        store, number, own = _leave(meeting, job), 0, meeting.host
    else:
        job, number, store = _take(meeting)
        own = _own_address(meeting)
        os.environ.update(pinned(job["threads"]))
        os.environ[TELL] = f"{meeting.host}:{meeting.port}/{job['id']}"
    machines = job["meeting"]["machines"]
    arguments = [f"--nnodes={machines}", f"--node-rank={number}", f"--rdzv-id={job['id']}", f"--local-addr={own}"]
    arguments += [f"--master-addr={meeting.host}", f"--master-port={meeting.port}", f"--rdzv-conf=timeout={WAIT_S}"]
    return job, [*arguments, f"--nproc-per-node={job['world'] // machines}"], store


def tell(record: dict[str, Any]) -> None:
    """Have the first machine know why a rank of this one failed, where this one has joined another; it must not fail."""
    where = os.environ.get(TELL)
    if where is None:
        return
    endpoint, _, job = where.rpartition("/")
    try:
        store = _store(Meeting.at(endpoint, first=False))
        store.set(f"{job}/error/{store.add(f'{job}/errors', 1)}", json.dumps(record))
    except (RuntimeError, ValueError):  # the first machine has gone: it knows more than this one
        return


def told(store: "PrefixStore", job: Job) -> list[dict[str, Any]]:
    """What the other machines' ranks said of their failures; waits a moment for it."""
    deadline = time.monotonic() + TOLD_S
    while time.monotonic() < deadline and store.add(f"{job['id']}/errors", 0) == 0:
        time.sleep(0.1)
    count = store.add(f"{job['id']}/errors", 0)
    return [json.loads(store.get(f"{job['id']}/error/{number}")) for number in range(1, count + 1)]


def _leave(meeting: Meeting, job: Job) -> "PrefixStore":
    store = _store(meeting, serving=True)
    store.set("job", json.dumps(job))
    return store


def _take(meeting: Meeting) -> tuple[Job, int, "PrefixStore"]:
    """The next job that has room for one more machine, and this machine's number in it."""
    after = meeting.after
    while True:
        try:
            store = _store(meeting)
            job = json.loads(store.get("job"))
            if job["id"] != after:
                _check_packages(job["packages"])
                number = store.add(f"{job['id']}/joined", 1)
                if number < job["meeting"]["machines"]:
                    return job, number, store
                after = job["id"]
        except RuntimeError:  # nobody is there: no training runs now
            pass
        time.sleep(POLL_S)


def _check_packages(wanted: dict[str, str]) -> None:
    """Raise UserError where this machine would compute with other versions than the first."""
    own = package_versions(PACKAGES)
    differ = [f"{name} {own.get(name)} (there {wanted[name]})" for name in wanted if own.get(name) != wanted[name]]
    if differ:
        raise UserError(
            f"this machine has {', '.join(differ)}; install the first machine's versions here, and join again"
        )


def _store(meeting: Meeting, *, serving: bool = False) -> "PrefixStore":
    """torch's store at the endpoint; the agent of the same process shares the one that it serves."""
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(
        meeting.host,
        meeting.port,
        is_master=serving,
        timeout=timedelta(seconds=ANSWER_S),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(NAMES, store)


def _own_address(meeting: Meeting) -> str:
    """The address of this machine that faces the first one."""
    with socket.create_connection((meeting.host, meeting.port), ANSWER_S) as connection:
        return str(connection.getsockname()[0])
