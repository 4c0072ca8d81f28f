"""What may be deleted: what no run record and no ref reaches, and what uncommitted work left behind.

Roots are all run records and all refs with their history, or with `keep_runs` the newest of both. From there everything
is kept that lineage leads to: the inputs of an artifact, the files of its manifest, the folders of the parts that those
files lie in. Of the rest, what is older than `days` goes. A deleted artifact leaves a tombstone: its manifest, under
another name. Deleting goes from the name to the bytes (manifest or marker first), so a gc that is killed leaves
nothing that looks whole and is not.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from storage.artifacts import Manifest, artifact_folder, list_artifacts, manifest_path
from storage.backend import ObjectInfo
from storage.leases import LEASES, TTL_S, Lease, sweeping
from storage.objects import Store
from storage.runs import Ref, RunRecord

DAY_S = 86_400.0
LEAST_AGE_BESIDE_WORK_S = DAY_S
TOMBSTONE = "tombstone.json"
OWN_RECORDS = ("manifest.json", "numerics.json", TOMBSTONE)


class Kind(StrEnum):
    """Why something may go."""

    artifact = "artifacts that nothing reaches"
    part = "parts that no artifact uses"
    unfinished = "artifacts that were never committed"
    attempt = "checkpoints and files beside a committed artifact"
    leftover = "interrupted writes"


BESIDE_WORK = (Kind.attempt, Kind.leftover)  # no run that goes on can be using these, once they are a day old


@dataclass(frozen=True)
class Garbage:
    """One thing to delete: its objects in the order of deletion, their size and the newest one's time."""

    kind: Kind
    name: str
    objects: tuple[ObjectInfo, ...]
    manifest: Manifest | None = None

    @property
    def bytes(self) -> int:
        """The size of all its objects."""
        return sum(info.bytes for info in self.objects)

    @property
    def modified(self) -> float:
        """When the newest of its objects was written."""
        return max(info.modified for info in self.objects)


@dataclass
class Sweep:
    """What `collect` found or deleted, what it left for the sake of runs at work, and what is kept."""

    garbage: list[Garbage] = field(default_factory=list)
    spared: list[Garbage] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    kept_artifacts: int = 0


def survey(store: Store, days: float, keep_runs: int = 0) -> Sweep:
    """What a gc would delete now. Changes nothing."""
    store.check_format()
    return _survey(store, days, keep_runs, time.time())


def collect(store: Store, days: float, keep_runs: int = 0) -> Sweep:
    """Delete it. Beside running pipelines only what they cannot be using; the rest is `spared`."""
    store.check_format()
    with sweeping(store) as right:
        sweep = _survey(store, days, keep_runs, right.now)
        sweep.leases = right.leases
        if right.leases:
            limit = right.now - LEAST_AGE_BESIDE_WORK_S
            old = [g for g in sweep.garbage if g.kind in BESIDE_WORK and g.modified < limit]
            sweep.spared = [g for g in sweep.garbage if g not in old]
            sweep.garbage = old
        for garbage in sweep.garbage:
            right.check()
            _delete(store, garbage)
    return sweep


def bury(store: Store, manifest: Manifest) -> None:
    """Take an artifact back: a tombstone stays, the manifest goes; its files are left."""
    folder = artifact_folder(manifest.kind, manifest.key)
    buried = {**manifest.model_dump(mode="json"), "buried": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    store.replace_record(f"{folder}/{TOMBSTONE}", buried)
    store.delete(manifest_path(manifest.kind, manifest.key))


def reachable(manifests: Iterable[Manifest], roots: Iterable[str]) -> set[str]:
    """The keys that lineage leads to from some keys, themselves included."""
    inputs = {manifest.key: tuple(manifest.inputs.values()) for manifest in manifests}
    return closure(roots, lambda key: inputs.get(key, ()))


def closure(keys: Iterable[str], next_to: Callable[[str], Iterable[str]]) -> set[str]:
    """The keys that steps lead to from some keys, themselves included."""
    found: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting += next_to(key)
    return found


def _survey(store: Store, days: float, keep_runs: int, now: float) -> Sweep:
    manifests = list_artifacts(store)
    keys = reachable(manifests, _roots(store, keep_runs))
    kept = [manifest for manifest in manifests if manifest.key in keys]
    garbage = [
        *_artifacts(store, manifests, keys),
        *_parts(store, kept),
        *_leftovers(store, now),
    ]
    old = [g for g in garbage if now - g.modified >= days * DAY_S]
    return Sweep(sorted(old, key=lambda g: (list(Kind).index(g.kind), g.name)), kept_artifacts=len(kept))


def _roots(store: Store, keep_runs: int) -> set[str]:
    """The keys that run records and refs name; with `keep_runs` only those of the newest."""
    runs, refs = _newest(store.paths("runs"), keep_runs), _newest(store.paths("refs"), min(keep_runs, 1))
    keys = {node.key for record in store.read_all_as(runs, RunRecord) for node in record.nodes}
    return keys | {ref.key for ref in store.read_all_as(refs, Ref)}


def _newest(paths: Sequence[str], keep: int) -> list[str]:
    """Of numbered records the newest `keep` of each folder; 0: all."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        folders[path.rsplit("/", 1)[0]].append(path)
    if not keep:
        return list(paths)
    return [path for own in folders.values() for path in sorted(own, key=_number)[-keep:]]


def _number(path: str) -> int:
    stem = path.rsplit("/", 1)[1].removesuffix(".json").removeprefix("@")
    return int(stem) if stem.isdecimal() else -1


def _artifacts(store: Store, manifests: Sequence[Manifest], keys: set[str]) -> list[Garbage]:
    """Whole artifacts that nothing reaches, folders without a manifest, and what lies beside the files of the others."""
    committed = {artifact_folder(m.kind, m.key): m for m in manifests}
    found = []
    for folder, objects in _folders(store.infos("artifacts")).items():
        manifest, name = committed.get(folder), folder.removeprefix("artifacts/").replace("/", " ")
        beside = [info for info in objects if info.path.rsplit("/", 1)[1] != TOMBSTONE]
        kind = Kind.unfinished if manifest is None else Kind.artifact
        if manifest is not None and manifest.key in keys:
            own = {entry.path for entry in manifest.files} | {f"{folder}/{record}" for record in OWN_RECORDS}
            beside, kind = [info for info in objects if info.path not in own], Kind.attempt
        if beside:
            found.append(Garbage(kind, name, tuple(beside), manifest if kind is Kind.artifact else None))
    return found


def _parts(store: Store, kept: Sequence[Manifest]) -> list[Garbage]:
    used = {_folder(entry.path) for manifest in kept for entry in manifest.files}
    found = []
    for folder, objects in _folders(store.infos("parts")).items():
        if folder not in used:
            markers_first = sorted(objects, key=lambda info: (not info.path.endswith(".json"), info.path))
            found.append(Garbage(Kind.part, folder.removeprefix("parts/").replace("/", " "), tuple(markers_first)))
    return found


def _leftovers(store: Store, now: float) -> list[Garbage]:
    """Interrupted writes, and the records of holders that are dead."""
    dead = [info for folder in (LEASES, "gc", "probes") for info in store.infos(folder) if now - info.modified > TTL_S]
    found = [Garbage(Kind.leftover, info.path, (info,)) for info in dead]
    return found + [Garbage(Kind.leftover, info.path, (info,)) for info in store.leftovers()]


def _delete(store: Store, garbage: Garbage) -> None:
    if garbage.manifest is not None:
        bury(store, garbage.manifest)
    if garbage.kind is Kind.leftover and not garbage.name.startswith((LEASES, "gc/", "probes/")):
        store.drop_leftovers(garbage.objects)
        return
    paths = [info.path for info in garbage.objects]
    names_first = [path for path in paths if path.endswith(".json")]
    store.delete(*names_first)
    store.delete(*(path for path in paths if not path.endswith(".json")))


def _folders(infos: Iterable[ObjectInfo]) -> dict[str, list[ObjectInfo]]:
    folders: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in infos:
        folders[_folder(info.path)].append(info)
    return folders


def _folder(path: str) -> str:
    """The folder of an artifact or a part: the first three steps of a path."""
    return "/".join(path.split("/")[:3])
