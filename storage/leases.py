"""Who is at work on a store: leases of running pipelines, and the one sweep of `nst gc`.

A run that goes on may use any part or artifact that it finds, however old, before anything names it as needed. So a
run writes a lease and then looks for a sweep; gc writes its sweep and then looks for leases. Of two that start at
once, at least one sees the other: the run waits for the sweep's end, gc leaves alone what a run may use. Ages are told
by the store's clock: the time of the looker's own record against the other's.
"""

import functools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.errors import MissingObject, StoreError, UserError
from storage.keys import Config
from storage.objects import Store

LEASES, SWEEP = "leases", "gc/sweep.json"
RENEW_S = 60.0
TTL_S = 600.0  # a holder that is silent for longer is dead
POLL_S = 1.0
JOIN_S = 5.0

log = logging.getLogger("nst.store")


class Lease(Config):
    """Who holds it, and how often it was renewed."""

    holder: str
    what: str
    machine: str = ""
    pid: int = 0
    renewals: int = 0

    def is_dead(self) -> bool:
        """Whether its process surely has ended: only told of one that would be seen from here."""
        return bool(self.machine) and self.machine == _machine() and not Path(f"/proc/{self.pid}").exists()


@contextmanager
def at_work(store: Store, what: str) -> Iterator[None]:
    """Hold a lease while the block runs; first waits for a sweep of gc to end."""
    path = f"{LEASES}/{uuid.uuid4().hex}.json"
    with _kept(store, path, what):
        told = False
        while _is_held(store, SWEEP, path):
            if not told:
                log.warning("waiting for `nst gc` on %s to end", store.url)
            told = True
            time.sleep(POLL_S)
            store.replace_record(path, _lease(what))
        yield


@contextmanager
def sweeping(store: Store) -> Iterator[tuple[float, list[Lease]]]:
    """Be the one sweep. Gives the store's time of now, and the leases of runs at work. Raises UserError if another sweeps."""
    own = f"gc/{uuid.uuid4().hex}.json"
    store.create_record(own, _lease("clock"))
    try:
        if store.exists(SWEEP) and not _is_held(store, SWEEP, own):  # of a gc that was killed
            if not store.create_record(f"gc/takeover-{_modified(store, SWEEP):.0f}.json", _lease("gc")):
                raise UserError(f"another `nst gc` on {store.url} has just begun; wait for it to end")
            store.delete(SWEEP)
        if not store.create_record(SWEEP, _lease("gc")):
            raise UserError(f"another `nst gc` is at work on {store.url}; wait for it to end")
        with _kept(store, SWEEP, "gc"):
            yield _modified(store, own), live_leases(store, _modified(store, own))
    finally:
        store.delete(own)


def live_leases(store: Store, now: float) -> list[Lease]:
    """The leases that were renewed less than `TTL_S` before `now` (the store's clock)."""
    fresh = [info.path for info in store.infos(LEASES) if now - info.modified < TTL_S]
    found = []
    for path in fresh:
        try:
            found.append(store.read_as(path, Lease))
        except StoreError:
            continue  # given back since it was listed
    return [lease for lease in found if not lease.is_dead()]


@contextmanager
def _kept(store: Store, path: str, what: str) -> Iterator[None]:
    """Write a lease, renew it in a thread, delete it at the end."""
    store.replace_record(path, _lease(what))
    finished = threading.Event()

    def renew() -> None:
        number = 0
        while not finished.wait(RENEW_S):
            number += 1
            try:
                store.replace_record(path, _lease(what, number))
            except StoreError:
                continue  # the next one may succeed; the work itself will tell of a store that is gone

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    store_failed = False
    try:
        yield
    except StoreError:
        store_failed = True  # do not wait for it a second time: the lease runs out
        raise
    finally:
        finished.set()
        thread.join(JOIN_S)
        if not store_failed:
            with suppress(StoreError):
                store.delete(path)


def _lease(what: str, renewals: int = 0) -> Lease:
    holder = f"{socket.gethostname()}:{os.getpid()}"
    return Lease(holder=holder, what=what, machine=_machine(), pid=os.getpid(), renewals=renewals)


@functools.cache
def _machine() -> str:
    """Names the processes that this one can see: the machine since its start, and the namespace of its process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _modified(store: Store, path: str) -> float:
    return next(info.modified for info in store.infos(path.rsplit("/", 1)[0]) if info.path == path)


def _is_held(store: Store, path: str, clock: str) -> bool:
    """Whether a lease is there, was renewed less than `TTL_S` before the record `clock`, and its holder is not dead."""
    infos = {info.path: info.modified for place in (path, clock) for info in store.infos(place.rsplit("/", 1)[0])}
    if path not in infos or infos[clock] - infos[path] >= TTL_S:
        return False
    try:
        return not store.read_as(path, Lease).is_dead()
    except MissingObject:
        return False
