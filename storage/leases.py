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
CHECK_S = 5.0

log = logging.getLogger("nst.store")


class Lease(Config):
    """Who holds it, and how often it was renewed."""

    holder: str
    what: str
    machine: str = ""
    pid: int = 0
    token: str = ""
    renewals: int = 0

    def is_dead(self) -> bool:
        """Whether its process surely has ended: only told of one that would be seen from here."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False  # another user's
        return False


@contextmanager
def at_work(store: Store, what: str) -> Iterator[None]:
    """Hold a lease while the block runs; first waits for a sweep of gc to end."""
    path, lease = f"{LEASES}/{uuid.uuid4().hex}.json", _lease(what)
    store.replace_record(path, lease)
    with _kept(store, path, lease):
        told = False
        while True:
            infos = [*store.infos("gc"), *store.infos(LEASES)]
            written = {info.path: info.modified for info in infos}
            if SWEEP not in written or not _is_held(store, SWEEP, written.get(path, written[SWEEP]) - written[SWEEP]):
                break
            if not told:
                log.warning("waiting for `nst gc` on %s to end", store.url)
            told = True
            time.sleep(POLL_S)
            store.replace_record(path, lease)
        yield


class Sweeping:
    """The right to delete: the store's time when it began, the runs at work then, and whether it still holds."""

    def __init__(self, store: Store, now: float, leases: list[Lease], held: "_Held") -> None:
        self.now, self.leases = now, leases
        self._store, self._held, self._checked = store, held, 0.0

    def check(self) -> None:
        """Raise UserError where this process slept so long that others may have begun meanwhile."""
        if time.time() - self._checked < CHECK_S:
            return
        if self._held.is_lost() or self._store.read_as(SWEEP, Lease).token != self._held.token:
            raise UserError("this `nst gc` was held up for so long that others may be at work; run it again")
        self._checked = time.time()


@contextmanager
def sweeping(store: Store) -> Iterator[Sweeping]:
    """Be the one sweep. Raises UserError if another is at work."""
    own = f"gc/{uuid.uuid4().hex}.json"
    store.create_record(own, _lease("clock"))
    try:
        written = {info.path: info.modified for info in store.infos("gc")}
        if SWEEP in written and not _is_held(store, SWEEP, written[own] - written[SWEEP]):  # of a gc that was killed
            if not store.create_record(f"gc/takeover-{written[SWEEP]:.3f}.json", _lease("gc")):
                raise UserError(f"another `nst gc` on {store.url} has just begun; wait for it to end")
            store.delete(SWEEP)
        lease = _lease("gc")
        if not store.create_record(SWEEP, lease):
            raise UserError(f"another `nst gc` is at work on {store.url}; wait for it to end")
        with _kept(store, SWEEP, lease) as held:
            yield Sweeping(store, written[own], live_leases(store, written[own]), held)
    finally:
        with suppress(StoreError):
            store.delete(own)


def live_leases(store: Store, now: float) -> list[Lease]:
    """The leases that were renewed less than `TTL_S` before `now` (the store's clock)."""
    fresh = [info.path for info in store.infos(LEASES) if now - info.modified < TTL_S]
    found = []
    for path in fresh:
        try:
            found.append(store.read_as(path, Lease))
        except MissingObject:
            continue  # given back since it was listed
        except StoreError:  # of another version, or cannot be read now: somebody may be at work
            found.append(Lease(holder="unknown", what=path))
    return [lease for lease in found if not lease.is_dead()]


class _Held:
    """A lease that this process holds: its token, and when it was last renewed (by a clock that suspension does not stop)."""

    def __init__(self, token: str) -> None:
        self.token, self.renewed = token, time.time()

    def is_lost(self) -> bool:
        """Whether it may have run out meanwhile."""
        return time.time() - self.renewed > TTL_S / 2


@contextmanager
def _kept(store: Store, path: str, lease: Lease) -> Iterator[_Held]:
    """Renew a lease that is written, in a thread; delete it at the end, if it is still ours."""
    held, finished = _Held(lease.token), threading.Event()

    def renew() -> None:
        number = 0
        while not finished.wait(RENEW_S):
            number += 1
            if path == SWEEP and held.is_lost():
                return  # another may have it by now
            try:
                store.replace_record(path, lease.model_copy(update={"renewals": number}))
                held.renewed = time.time()
            except StoreError:
                continue  # the next one may succeed; the work itself will tell of a store that is gone

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    store_failed = False
    try:
        yield held
    except StoreError:
        store_failed = True  # do not wait for it a second time: the lease runs out
        raise
    finally:
        finished.set()
        thread.join(JOIN_S)
        if not store_failed:
            with suppress(StoreError):
                if store.read_as(path, Lease).token == held.token:
                    store.delete(path)


def _lease(what: str) -> Lease:
    holder = f"{socket.gethostname()}:{os.getpid()}"
    return Lease(holder=holder, what=what, machine=_machine(), pid=os.getpid(), token=uuid.uuid4().hex)


@functools.cache
def _machine() -> str:
    """Names the processes that this one can see: the machine since its start, and the namespace of its process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _is_held(store: Store, path: str, age_s: float) -> bool:
    """Whether a lease of this age still stands: renewed less than `TTL_S` ago, by a holder that is not known to be dead."""
    if age_s >= TTL_S:
        return False
    try:
        return not store.read_as(path, Lease).is_dead()
    except MissingObject:
        return False
    except StoreError:
        return True  # of another version, perhaps
