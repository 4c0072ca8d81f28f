"""Who is at work on a store: leases of running pipelines, and the one sweep of `nst gc`.

A run that goes on may use any part or artifact that it finds, however old, before anything names it as needed. So a
run writes a lease and then looks for a sweep; gc writes its sweep and then looks for leases. Of two that start at
once, at least one sees the other: the run waits for the sweep's end, gc leaves alone what a run may use. Ages are told
by the store's clock: the time of the looker's own record against the other's.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from storage.errors import StoreError, UserError
from storage.keys import Config
from storage.objects import Store

LEASES, SWEEP = "leases", "gc/sweep.json"
RENEW_S = 60.0
TTL_S = 600.0  # a holder that is silent for longer is dead
POLL_S = 1.0

log = logging.getLogger("nst.store")


class Lease(Config):
    """Who holds it, and how often it was renewed."""

    holder: str
    what: str
    renewals: int = 0


@contextmanager
def at_work(store: Store, what: str) -> Iterator[None]:
    """Hold a lease while the block runs; first waits for a sweep of gc to end."""
    path = f"{LEASES}/{uuid.uuid4().hex}.json"
    with _kept(store, path, what):
        told = False
        while (sweep := _age(store, SWEEP, path)) is not None and sweep < TTL_S:
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
        age = _age(store, SWEEP, own)
        if age is not None and age >= TTL_S:
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
    return found


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
    try:
        yield
    finally:
        finished.set()
        thread.join()
        store.delete(path)


def _lease(what: str, renewals: int = 0) -> Lease:
    return Lease(holder=f"{socket.gethostname()}:{os.getpid()}", what=what, renewals=renewals)


def _modified(store: Store, path: str) -> float:
    return next(info.modified for info in store.infos(path.rsplit("/", 1)[0]) if info.path == path)


def _age(store: Store, path: str, clock: str) -> float | None:
    """How long before the record `clock` another was written, in seconds; None where it is not there."""
    infos = {info.path: info.modified for place in (path, clock) for info in store.infos(place.rsplit("/", 1)[0])}
    return infos[clock] - infos[path] if path in infos and clock in infos else None
