"""Is everything in the store what was written? Names what is missing, short, altered or does not fit together."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum

from storage.artifacts import SOURCE_ROLE, FileEntry, Manifest, list_artifacts, manifest_path, part_folder
from storage.errors import MissingObject, StoreError
from storage.gc import TOMBSTONE, bury
from storage.objects import READ_ATTEMPTS, TRANSFERS, Store
from storage.runs import Ref

RECORDS = {  # the sealed records of each folder, not the artifacts' own JSON
    "artifacts": rf"/(manifest|numerics|{TOMBSTONE.removesuffix('.json')})\.json$",
    "parts": r"/[0-9a-f]{16}\.json$",
    "runs": r"\.json$",
    "refs": r"\.json$",
}
OnProgress = Callable[[int, int], None]


class Kind(StrEnum):
    """How sure it is that an object is worthless: the first two are, and may be discarded."""

    file = "a file that is missing, short or altered"
    record = "a record that is not as it was written"
    unreadable = "an object that could not be read this time"
    dangling = "a name that leads nowhere"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the object, what is wrong with it, and the artifacts that need it (`kind key`)."""

    kind: Kind
    path: str
    what: str
    needed_by: tuple[str, ...] = ()


@dataclass
class Verdict:
    """What was checked, and what is wrong."""

    artifacts: int = 0
    files: int = 0
    records: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify_artifact(store: Store, manifest: Manifest, on_progress: OnProgress = lambda done, total: None) -> Verdict:
    """Hash every file of an artifact, as it lies in the store."""
    return _verify_files(store, [manifest], on_progress)


def verify_all(store: Store, on_progress: OnProgress = lambda done, total: None) -> Verdict:
    """Hash every file of every artifact, check the seal of every record, and that refs and inputs lead somewhere."""
    store.check_format()
    records = [path for folder in RECORDS for path in store.paths(folder) if re.search(RECORDS[folder], path)]
    damaged = store.damaged_records(records)
    manifests = list_artifacts(store, skip=damaged)
    verdict = _verify_files(store, manifests, on_progress)
    verdict.records = len(records)
    elsewhere = (f"/{TOMBSTONE}", *damaged)  # artifacts that were there, or are with a damaged manifest
    known = {path.split("/")[2] for path in records if path.startswith("artifacts/") and path.endswith(elsewhere)}
    broken = [Problem(Kind.record, path, f"is not as it was written ({why})") for path, why in damaged.items()]
    refs = [path for path in records if path.startswith("refs/") and path not in damaged]
    verdict.problems = [*broken, *_dangling(store, manifests, refs, known), *verdict.problems]
    return verdict


def discard_broken(store: Store, verdict: Verdict) -> list[str]:
    """Take back the artifacts and parts that problems touch, so that a run makes them anew; returns their names.

    Only what is surely worthless: damaged objects are deleted, a tombstone of each artifact stays. Run records, refs and
    what could not be read this time are left alone.
    """
    problems = [problem for problem in verdict.problems if problem.kind in (Kind.file, Kind.record)]
    skip = {problem.path for problem in problems}
    manifests = {f"{m.kind} {m.key}": m for m in list_artifacts(store, skip)}
    discarded = []
    for name in dict.fromkeys(name for problem in problems for name in problem.needed_by):
        if name in manifests:
            bury(store, manifests[name])
            discarded.append(name)
    for problem in problems:
        steps = problem.path.split("/")
        if steps[0] == "parts":
            folder = part_folder(*steps[1:3])
            store.delete(*(path for path in store.paths(folder) if path.endswith(".json")))
            discarded.append("part " + " ".join(steps[1:3]))
        if steps[0] in ("parts", "artifacts"):
            store.delete(problem.path)
            if problem.kind is Kind.record and steps[0] == "artifacts":
                discarded.append(" ".join(steps[1:3]))
    return list(dict.fromkeys(discarded))


def _verify_files(store: Store, manifests: Sequence[Manifest], on_progress: OnProgress) -> Verdict:
    needed_by: dict[FileEntry, list[str]] = {}
    for manifest in manifests:
        for entry in manifest.files:  # a part's file may be of several artifacts, under other names
            plain = entry.model_copy(update={"name": "", "rows": None})
            needed_by.setdefault(plain, []).append(f"{manifest.kind} {manifest.key}")
    entries = list(needed_by)
    sizes = store.sizes([entry.path for entry in entries])
    total = sum(entry.bytes for entry in entries)
    verdict = Verdict(artifacts=len(manifests), files=len(entries), bytes=total)
    done = 0
    with ThreadPoolExecutor(TRANSFERS) as pool:
        found = pool.map(lambda entry: _look(store, entry, sizes.get(entry.path)), entries)
        for entry, problem in zip(entries, found, strict=True):
            if problem is not None:
                verdict.problems.append(Problem(*problem, tuple(dict.fromkeys(needed_by[entry]))))
            done += entry.bytes
            on_progress(done, total)
    return verdict


def _look(store: Store, entry: FileEntry, size: int | None) -> tuple[Kind, str, str] | None:
    """What is wrong with a file; None where nothing is."""
    if size is None:
        return Kind.file, entry.path, "is missing"
    if size != entry.bytes:
        return Kind.file, entry.path, f"has {size:,} bytes instead of {entry.bytes:,}"
    try:
        for _ in range(READ_ATTEMPTS):  # a byte may be flipped on its way
            if store.hash_object(entry) == entry.sha256:
                return None
    except MissingObject:
        return Kind.file, entry.path, "is missing"
    except StoreError as error:
        return Kind.unreadable, entry.path, f"cannot be read now ({error})"
    return Kind.file, entry.path, "is altered: its sha256 is another"


def _dangling(store: Store, manifests: Sequence[Manifest], refs: Sequence[str], known: set[str]) -> list[Problem]:
    known = known | {manifest.key for manifest in manifests}
    problems = []
    for manifest in manifests:
        for role, key in manifest.inputs.items():
            if key not in known and role != SOURCE_ROLE:
                path = manifest_path(manifest.kind, manifest.key)
                problems.append(Problem(Kind.dangling, path, f"names {role} {key}, which is not in the store"))
    for path, ref in zip(refs, store.read_all_as(refs, Ref), strict=True):
        if ref.key not in known:
            problems.append(Problem(Kind.dangling, path, f"points at {ref.kind} {ref.key}, which is not in the store"))
    return problems
