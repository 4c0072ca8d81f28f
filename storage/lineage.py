"""Lineage: what every artifact was made from and what was made of it, told by the records of a store alone.

One pass reads all manifests, the tombstones of what was deleted, run records and refs. What a record names and nothing
describes is a node too, so the graph has no loose ends. A key is a digest of the keys of the inputs, so there are no circles.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from storage.artifacts import SOURCE_ROLE, Manifest, manifest_of
from storage.errors import StoreError, UserError
from storage.gc import TOMBSTONE, closure
from storage.objects import Store
from storage.runs import resolve_ref

LEAST_DIGITS = 6  # of a key, that name an artifact


class State(StrEnum):
    """What there is of a node. The values are said to people."""

    made = "in the store"
    deleted = "deleted"  # a tombstone is left
    recorded = "not in the store"  # a run record has it: not made yet, or lost
    files = "files outside the store"
    unknown = "unknown"  # nothing but the key that another artifact names


@dataclass(frozen=True)
class LineageNode:
    """An artifact, or the external files that one was made from.

    `manifest` is None where only others name it; of a deleted artifact it is what the tombstone keeps. `names`: refs, those
    that point here now first; a ref that was moved on as `digits/1/label@1`. `runs`: stages of runs, the newest first.
    """

    key: str
    kind: str
    stage: str
    state: State
    inputs: Mapping[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None
    deleted: str = ""  # when
    names: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What people call it: a ref, else its stage in a run, else its kind and the beginning of its key."""
        if self.names:
            return self.names[0]
        if self.runs:
            experiment, _, rest = self.runs[0].partition("/")
            return f"{experiment}/{rest.partition('/')[2]}"
        return f"{self.kind or 'artifact'} {self.key[:12]}"

    @property
    def created(self) -> str:
        """When it was made, as ISO 8601; empty where nobody knows."""
        return str(self.manifest.provenance.get("created", "")) if self.manifest else ""


@dataclass(frozen=True)
class Lineage:
    """The graph of a store. `nodes` by key; `history`: of each ref the keys that it pointed at, the oldest first."""

    nodes: Mapping[str, LineageNode]
    history: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def users(self) -> dict[str, list[tuple[str, str]]]:
        """Key -> (role, key) of what was made of it, in the order of making."""
        found: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for node in sorted(self.nodes.values(), key=lambda node: (node.created, node.name, node.key)):
            for role, key in node.inputs.items():
                found[key].append((role, node.key))
        return found

    def find(self, store: Store, text: str) -> LineageNode:
        """The node that a ref or the beginning of a key names. Raises UserError where none or several do."""
        if len(text) >= LEAST_DIGITS and "/" not in text:
            keys = [key for key in self.nodes if key.startswith(text)]
            if len(keys) > 1:
                raise UserError(f"{len(keys)} keys begin with {text}: {', '.join(keys[:3])} ...; give more digits")
            if keys:
                return self.nodes[keys[0]]
        return self.nodes[resolve_ref(store, text).key]

    def inputs(self, key: str) -> list[str]:
        """The keys that it was made from, each once."""
        return list(dict.fromkeys(self.nodes[key].inputs.values()))

    def made_of(self, key: str) -> list[str]:
        """The keys of what was made of it, each once."""
        return list(dict.fromkeys(user for _, user in self.users.get(key, ())))

    def ancestors(self, key: str) -> set[str]:
        """All that it was made from, over any number of steps, itself left out."""
        return self._closure(self.inputs(key), up=True)

    def descendants(self, key: str) -> set[str]:
        """All that was made of it, over any number of steps, itself left out."""
        return self._closure(self.made_of(key), up=False)

    def around(self, key: str) -> set[str]:
        """Its ancestors, itself, its descendants."""
        return {key} | self.ancestors(key) | self.descendants(key)

    def nearest(self, key: str, keys: Collection[str], last: str = "") -> list[str]:
        """Those of some keys that edges among them join to it, by the number of steps in either direction, itself first.

        Artifacts of the kind `last` are stepped over only when all else has been found: a report is near to everything.
        """
        found, waiting, later = {key: None}, deque([key]), deque[str]()
        while waiting or later:
            here = waiting.popleft() if waiting else later.popleft()
            for step in (*self.inputs(here), *self.made_of(here)):
                if step in keys and step not in found:
                    found[step] = None
                    (later if self.nodes[step].kind == last else waiting).append(step)
        return list(found)

    def layers(self, keys: Collection[str]) -> dict[str, int]:
        """The longest way from a beginning to each of some nodes, over nodes among them: every edge leads to a higher number.

        Raises StoreError where records lead in a circle, which no stage can have made.
        """
        inputs = {key: [step for step in self.inputs(key) if step in keys] for key in keys}
        left = {key: len(steps) for key, steps in inputs.items()}
        ready = deque(sorted(key for key, number in left.items() if not number))
        found = dict.fromkeys(ready, 0)
        done = 0
        while ready:
            here = ready.popleft()
            done += 1
            for user in self.made_of(here):
                if user in left:
                    found[user] = max(found.get(user, 0), found[here] + 1)
                    left[user] -= 1
                    if not left[user]:
                        ready.append(user)
        if done < len(left):
            some = ", ".join(sorted(key for key, number in left.items() if number)[:3])
            raise StoreError(f"manifests lead in a circle ({some} ...); were they written by hand? `nst verify --all`")
        return found

    def predecessor(self, key: str) -> tuple[str, str] | None:
        """What an artifact may be compared with, and why that: (key, words). None where there is nothing.

        Where its ref pointed before; else the same role an iteration before; else what the same stage made before it.
        """
        node = self.nodes[key]
        for name in (name.partition("@")[0] for name in node.names):
            keys = self.history[name]
            newest = len(keys) - keys[::-1].index(key) - 1
            before = [other for other in keys[:newest] if other != key and self._described(other)]
            if before:
                return before[-1], f"{name} before"
        for name in node.names:
            experiment, _, rest = name.partition("@")[0].partition("/")
            number, _, role = rest.rpartition("/")
            for other in _iterations_before(number, role):
                keys = self.history.get(f"{experiment}/{other}", ())
                if keys and self._described(keys[-1]) and self.nodes[keys[-1]].kind == node.kind:
                    return keys[-1], f"{experiment}/{other}"
        line = self._by_stage.get(node.stage, [])
        place = line.index(key) if key in line else 0
        return (line[place - 1], f"what {node.stage} made before") if place else None

    @cached_property
    def _by_stage(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for node in sorted(self.nodes.values(), key=lambda node: (node.created, node.key)):
            if node.created:
                found[node.stage].append(node.key)
        return found

    def _described(self, key: str) -> bool:
        return key in self.nodes and self.nodes[key].manifest is not None

    def _closure(self, keys: Iterable[str], up: bool) -> set[str]:
        return closure(keys, self.inputs if up else self.made_of)


def read_lineage(store: Store) -> Lineage:
    """The lineage of everything in a store, deleted things too. Raises StoreError on damaged records."""
    store.check_format()
    artifacts = _read_artifacts(store)
    runs = store.read_all_records([path for path in store.paths("runs") if path.endswith(".json")])
    history = _read_refs(store)
    names, stages = _names(history), _stages(runs)
    nodes: dict[str, LineageNode] = {}

    def add(key: str, kind: str, stage: str, state: State, inputs: Mapping[str, str], **more: Any) -> None:
        if key not in nodes:
            known_as = tuple(names.get(key, ())), tuple(stages.get(key, ()))
            nodes[key] = LineageNode(key, kind, stage, state, inputs, names=known_as[0], runs=known_as[1], **more)

    for m, when in artifacts.values():
        add(m.key, m.kind, m.stage, State.deleted if when else State.made, m.inputs, manifest=m, deleted=when)
    for node in (node for run in runs for node in run["nodes"]):
        add(node["key"], node["kind"], node["stage"], State.recorded, node["inputs"])
    for kind, key in (target for targets in history.values() for target in targets):
        add(key, kind, "", State.unknown, {})
    for node in list(nodes.values()):
        for role, key in node.inputs.items():
            files = role == SOURCE_ROLE
            add(key, "files" if files else "", "", State.files if files else State.unknown, {})
    return Lineage(nodes, {name: tuple(key for _, key in targets) for name, targets in history.items()})


def _read_artifacts(store: Store) -> dict[str, tuple[Manifest, str]]:
    """Key -> manifest, and the time of its deletion or nothing; beside runs and a gc at work too.

    A listing of many folders is not of one moment: what was made meanwhile may be listed without its input, which was
    committed before it. Such inputs are looked for again.
    """
    found: dict[str, tuple[Manifest, str]] = {}
    wanted: set[str] | None = None
    while wanted is None or wanted:
        own = _read_listed(store, [p for p in store.paths("artifacts") if wanted is None or p.split("/")[2] in wanted])
        found |= own
        named = {key for m, _ in own.values() for role, key in m.inputs.items() if role != SOURCE_ROLE}
        wanted = named - set(found)
    return found


def _read_listed(store: Store, paths: Sequence[str]) -> dict[str, tuple[Manifest, str]]:
    """What some paths tell. A tombstone is written before its manifest goes, and stays: it is read after the manifests."""
    listed = [path for path in paths if path.endswith("/manifest.json")]
    made = store.read_present_records(listed)
    gone = [path.replace("/manifest.json", f"/{TOMBSTONE}") for path in listed if path not in made]
    buried = store.read_present_records([*(path for path in paths if path.endswith(f"/{TOMBSTONE}")), *gone])
    found = {}
    for path, record in (*buried.items(), *made.items()):  # of what was made again the manifest counts
        when = str(record.pop("buried", ""))
        manifest = manifest_of(path, record)
        found[manifest.key] = manifest, when
    return found


def names_of_artifacts(store: Store) -> dict[str, list[str]]:
    """Key -> the refs that point at it, then those that did (`digits/1/label@1`)."""
    return _names(_read_refs(store))


def _read_refs(store: Store) -> dict[str, list[tuple[str, str]]]:
    """Ref -> (kind, key) of its targets, the oldest first."""
    found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    paths = [path for path in store.paths("refs") if path.endswith(".json")]
    for path, record in zip(paths, store.read_all_records(paths), strict=True):
        name, _, number = path.removeprefix("refs/").removesuffix(".json").rpartition("/@")
        found[name].append((int(number), record["kind"], record["key"]))
    return {name: [target[1:] for target in sorted(targets)] for name, targets in found.items()}


def _names(history: Mapping[str, list[tuple[str, str]]]) -> dict[str, list[str]]:
    """Key -> the refs that point at it, then those that did, with the newest number at which they did."""
    now, before = defaultdict(list), defaultdict(list)
    for name, targets in sorted(history.items()):
        now[targets[-1][1]].append(name)
        for key, number in {key: number for number, (_, key) in enumerate(targets, 1)}.items():
            if key != targets[-1][1]:
                before[key].append(f"{name}@{number}")
    return {key: [*now[key], *before[key]] for key in [*now, *before]}


def _stages(runs: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Key -> `experiment/number/stage` of the runs that have it, the newest of an experiment first."""
    found: dict[str, list[str]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["experiment"], -run["number"])):
        for node in run["nodes"]:
            found[node["key"]].append(f"{run['experiment']}/{run['number']}/{node['name']}")
    return found


def _iterations_before(number: str, role: str) -> list[str]:
    """The stages to which the same one of an iteration is compared: 3/label with 2/label, 1/student with 0/teacher."""
    if not number.isdecimal():
        return []
    before = [f"{n}/{role}" for n in range(int(number) - 1, -1, -1)]
    return [*before, "0/teacher"] if role == "student" else before
