"""Artifacts: immutable, keyed results; and parts, the finished pieces of one that a crash must not lose.

Layout below the store's root:

    artifacts/<kind>/<key>/manifest.json        the commit: written last, once, by create-if-absent
    artifacts/<kind>/<key>/<name>-<sha>.<ext>   the artifact's own files, under names that contain their digest
    artifacts/<kind>/<key>/numerics.json        what was probed once (dtype, layout), followed by every resume and rank;
                                                replaced only where nothing was made with it
    artifacts/<kind>/<key>/attempts/<id>/...    checkpoints of attempts that have not committed yet
    parts/<stage>/<part key>/<name>-<sha>.<ext> files of a part; a part is shared by every artifact with its content
    parts/<stage>/<part key>/<numerics>.json    the part's create-if-absent marker

Readers see an artifact whole or not at all. A part's key is a digest of what it is made from (its own inputs, not the
artifact's), so a data set that grows keeps the parts that did not change.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from storage.errors import MissingObject, StoreError
from storage.keys import KEY_HEX, Config, digest, file_sha256
from storage.objects import TRANSFERS, Store

SCHEMA_VERSION = 2  # 2: records carry a seal
NAME_DIGEST_HEX = 16
SOURCE_ROLE = "source"  # the input that is no artifact but the fingerprint of external data
FEW_PARTS = 32  # more are looked for by listing all parts of their stage


class FileEntry(Config):
    """One file of an artifact: its logical name, where it lies below the store's root, and what it must contain."""

    name: str
    path: str
    bytes: int
    sha256: str
    rows: int | None = None


class Part(Config):
    """A finished piece of work: its files and the facts that the artifact sums up."""

    stage: str
    key: str
    numerics: dict[str, Any]
    files: tuple[FileEntry, ...]
    facts: dict[str, Any] = {}

    def file(self, name: str) -> FileEntry:
        """The file of that logical name."""
        return next(entry for entry in self.files if entry.name == name)


class Manifest(Config):
    """The JSON that commits an artifact: everything needed to trust, reproduce and trace it. Never a secret."""

    schema_version: int = SCHEMA_VERSION
    kind: str
    key: str
    stage: str
    stage_version: int
    generation: int = 0
    config: dict[str, Any]
    inputs: dict[str, str]
    files: tuple[FileEntry, ...]
    metrics: dict[str, Any] = {}
    provenance: dict[str, Any] = Field({}, description="code commit, package versions, host, device, world, seconds")

    def file(self, name: str) -> FileEntry:
        """The file of that logical name. Raises StoreError naming the artifact where it has none."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise StoreError(f"{self.kind} {self.key} has no file {name!r}")

    def files_named(self, names: Iterable[str]) -> list[FileEntry]:
        """The files of many logical names, in their order: looked up, not searched for. Raises StoreError as `file` does."""
        by_name = {entry.name: entry for entry in reversed(self.files)}
        return [by_name.get(name) or self.file(name) for name in names]

    def files_under(self, prefix: str) -> tuple[FileEntry, ...]:
        """The files whose logical names start with `prefix`: by folder, and in it by number, `99999` before `100000`."""
        return tuple(sorted((f for f in self.files if f.name.startswith(prefix)), key=_in_number_order))


def artifact_folder(kind: str, key: str) -> str:
    """The artifact's folder below the store's root."""
    return f"artifacts/{kind}/{key}"


def manifest_path(kind: str, key: str) -> str:
    """Where an artifact's manifest lies."""
    return f"{artifact_folder(kind, key)}/manifest.json"


def find(store: Store, kind: str, key: str) -> Manifest | None:
    """The committed artifact, or None. Raises StoreError on a manifest that was damaged or made by a newer version."""
    path = manifest_path(kind, key)
    try:
        manifest = manifest_of(path, store.read_record(path))
    except MissingObject:
        return None
    if (manifest.kind, manifest.key) != (kind, key):
        raise StoreError(f"{path} names {manifest.kind} {manifest.key}; was it copied by hand?")
    return manifest


def get(store: Store, kind: str, key: str) -> Manifest:
    """The committed artifact. Raises StoreError where it is missing."""
    manifest = find(store, kind, key)
    if manifest is None:
        raise StoreError(f"{kind} {key} is not in {store.url}; run the stage that makes it first")
    return manifest


def commit(store: Store, manifest: Manifest) -> Manifest:
    """Publish an artifact whose files are all in the store: the only place that writes a manifest.

    Checks first that each file is there with its size. Where another attempt committed first, that one is returned:
    both attempts end with the same whole artifact.
    """
    check_files(store, manifest.files)
    names = [entry.name for entry in manifest.files]
    if len(set(names)) != len(names):
        raise StoreError(f"{manifest.kind} {manifest.key}: two files have one name; not committed")
    if store.create_record(manifest_path(manifest.kind, manifest.key), manifest):
        return manifest
    return get(store, manifest.kind, manifest.key)


def check_files(store: Store, files: Sequence[FileEntry]) -> None:
    """Raise StoreError where a file is missing or has another size. Reads no file."""
    sizes = store.sizes([entry.path for entry in files])
    for entry in files:
        if sizes.get(entry.path) != entry.bytes:
            found = (
                f"has {sizes[entry.path]:,} bytes instead of {entry.bytes:,}" if entry.path in sizes else "is missing"
            )
            raise StoreError(
                f"{store.url}: {entry.path} {found}; `nst verify --all --discard` clears what is broken, then run again"
            )


def publish_file(store: Store, folder: str, name: str, local: Path, rows: int | None = None) -> FileEntry:
    """Move a finished local file into `folder` under a name that contains its digest, and describe it.

    `name` is the file's logical name in the artifact, e.g. `shards/train/00000.tar`.
    """
    sha256, size = file_sha256(local), local.stat().st_size
    logical = Path(name)
    path = f"{folder}/{logical.stem}-{sha256[:NAME_DIGEST_HEX]}{logical.suffix}"
    store.put_file(local, path)
    return FileEntry(name=name, path=path, bytes=size, sha256=sha256, rows=rows)


def part_folder(stage: str, key: str) -> str:
    """The part's folder below the store's root."""
    return f"parts/{stage}/{key}"


def find_part(store: Store, stage: str, key: str, numerics: dict[str, Any]) -> Part | None:
    """The finished part with these numerics, its files all in place; None where it has to be made (again)."""
    return find_parts(store, stage, [key], numerics)[key]


def find_parts(store: Store, stage: str, keys: Sequence[str], numerics: dict[str, Any]) -> dict[str, Part | None]:
    """The finished parts of some keys. Many are found by one listing and read side by side, not one by one.

    Raises StoreError where a part's file is missing or has another size.
    """
    markers = {key: _marker(stage, key, numerics) for key in keys}
    folders = [part_folder(stage, key) for key in markers] if len(markers) <= FEW_PARTS else [f"parts/{stage}"]
    sizes = {info.path: info.bytes for folder in folders for info in store.infos(folder)}
    done = {key: path for key, path in markers.items() if path in sizes}
    parts = dict(zip(done, store.read_all_as(list(done.values()), Part), strict=True))
    for key, part in parts.items():
        for entry in part.files:
            if sizes.get(entry.path) != entry.bytes:
                raise StoreError(
                    f"{store.url}: {entry.path} is missing or has another size than {entry.bytes:,} bytes; "
                    f"delete {markers[key]} and run again"
                )
    return {key: parts.get(key) for key in keys}


def made_parts(stage: str, found: Mapping[str, Part | None], keys: Sequence[str]) -> list[Part]:
    """The parts of these keys, in their order. Raises StoreError where one is not there after all were made."""
    parts = [(key, found[key]) for key in keys]
    gone = [key for key, part in parts if part is None]
    if gone:
        raise StoreError(f"part {gone[0]} of {stage} vanished while the others were made; run again")
    return [part for _, part in parts if part is not None]


def publish_part(
    store: Store,
    stage: str,
    key: str,
    numerics: dict[str, Any],
    files: Mapping[str, tuple[Path, int | None]],
    facts: dict[str, Any] | None = None,
) -> Part:
    """Move a part's finished files (logical name -> local file, rows) into the store, then mark the part as done.

    Returns the part that stands: this one, or the one of an attempt that was first.
    """
    folder = part_folder(stage, key)
    with ThreadPoolExecutor(TRANSFERS) as pool:
        made = [pool.submit(publish_file, store, folder, name, *place) for name, place in files.items()]
        entries = tuple(entry.result() for entry in made)
    part = Part(stage=stage, key=key, numerics=numerics, files=entries, facts=facts or {})
    path = _marker(stage, key, numerics)
    if store.create_record(path, part):
        return part
    return store.read_as(path, Part)


def agree_numerics(
    store: Store, kind: str, key: str, probed: dict[str, Any], instead_of: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Publish what was probed for an artifact in the making, or take what an earlier attempt published.

    `instead_of`: what an earlier attempt published, known to have made nothing (it failed, or ran on another machine): it
    is replaced. Should two attempts replace it at once, each may go on with its own: the parts of both are told apart.
    """
    path = f"{artifact_folder(kind, key)}/numerics.json"
    if store.create_record(path, probed):
        return probed
    found = store.read_record(path)
    if found != instead_of:
        return found
    store.replace_record(path, probed)
    return probed


def agreed_numerics(store: Store, kind: str, key: str) -> dict[str, Any] | None:
    """What an earlier attempt at an artifact published as its numerics; None where there was none."""
    try:
        return store.read_record(f"{artifact_folder(kind, key)}/numerics.json")
    except MissingObject:
        return None


def attempts_folder(kind: str, key: str) -> str:
    """Where attempts at an artifact keep what a resume needs, each in a folder of its own."""
    return f"{artifact_folder(kind, key)}/attempts"


def discard_attempt(store: Store, kind: str, key: str, attempt: str) -> None:
    """Delete what an attempt kept for a resume, after its artifact was committed."""
    store.delete(*store.paths(f"{attempts_folder(kind, key)}/{attempt}"))


def list_artifacts(store: Store, skip: Container[str] = (), kind: str = "") -> list[Manifest]:
    """Every committed artifact (of a kind), in the order of kind and key; without those whose manifest is in `skip`."""
    folder = f"artifacts/{kind}" if kind else "artifacts"
    paths = [p for p in store.paths(folder) if p.endswith("/manifest.json") and p not in skip]
    return [manifest_of(path, record) for path, record in zip(paths, store.read_all_records(paths), strict=True)]


def manifest_of(path: str, record: dict[str, Any]) -> Manifest:
    """A record read at `path` as a manifest. Raises StoreError where it is none, or was made by a newer version."""
    version = record.get("schema_version", 0)
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise StoreError(f"{path} has schema version {version}, this program reads up to {SCHEMA_VERSION}; update it")
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        raise StoreError(f"{path} is no manifest ({error.errors()[0]['msg']}); delete it and run again") from None


def _in_number_order(entry: FileEntry) -> tuple[str, int, str]:
    """Numbers in names have five digits, and more where there are more files: a longer name is a larger number."""
    folder, _, name = entry.name.rpartition("/")
    return folder, len(name), name


def _marker(stage: str, key: str, numerics: dict[str, Any]) -> str:
    return f"{part_folder(stage, key)}/{digest(numerics)[: KEY_HEX // 2]}.json"
