"""Run records and refs: what an experiment resolved to, and readable names for what it made.

Both are numbered files made by create-if-absent, so that history comes for free and no lock is needed.
"""

from typing import Any

from storage.errors import UserError
from storage.keys import Config
from storage.objects import Store


class NodeRecord(Config):
    """One stage of a run: the identity it had, so that a later plan can say what changed."""

    name: str
    stage: str
    kind: str
    key: str
    version: int
    generation: int = 0
    config: dict[str, Any]
    inputs: dict[str, str]


class RunRecord(Config):
    """`runs/<experiment>/<n>.json`: the resolved config and each stage's key and generation."""

    experiment: str
    number: int
    recipe: str
    config: dict[str, Any]
    sources: dict[str, Any]
    nodes: tuple[NodeRecord, ...]
    prefect_run: str = ""

    @property
    def name(self) -> str:
        """How the command line names this run: `cifar10/3`."""
        return f"{self.experiment}/{self.number}"

    @property
    def generations(self) -> dict[str, int]:
        """The forced reruns of each stage so far, by the stage's name."""
        return {node.name: node.generation for node in self.nodes}

    def node(self, name: str) -> NodeRecord | None:
        """The stage of that name, or None."""
        return next((node for node in self.nodes if node.name == name), None)


def _numbers(store: Store, folder: str) -> list[int]:
    stems = [path.rsplit("/", 1)[1].removesuffix(".json") for path in store.paths(folder) if path.endswith(".json")]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def list_experiments(store: Store) -> list[str]:
    """The names of all experiments with a run in the store."""
    return sorted({path.split("/")[1] for path in store.paths("runs")})


def list_runs(store: Store, experiment: str) -> list[RunRecord]:
    """All runs of an experiment, the oldest first."""
    return [read_run(store, f"{experiment}/{number}") for number in _numbers(store, f"runs/{experiment}")]


def latest_run(store: Store, experiment: str) -> RunRecord | None:
    """The experiment's newest run record, or None."""
    numbers = _numbers(store, f"runs/{experiment}")
    return read_run(store, f"{experiment}/{numbers[-1]}") if numbers else None


def read_run(store: Store, name: str) -> RunRecord:
    """The run named `experiment` (its newest) or `experiment/n`. Raises UserError naming the runs there are."""
    experiment, _, number = name.partition("/")
    if not number:
        latest = latest_run(store, experiment) if experiment else None
        if latest is not None:
            return latest
    elif number.isdecimal() and store.exists(f"runs/{experiment}/{int(number)}.json"):
        return store.read_as(f"runs/{experiment}/{int(number)}.json", RunRecord)
    known = ", ".join(list_experiments(store)) or "none"
    raise UserError(f"no run {name!r} in {store.url}; experiments there: {known}")


def record_run(store: Store, draft: RunRecord) -> RunRecord:
    """Write the run record under the next free number; a run that equals the newest one is not recorded again."""
    latest = latest_run(store, draft.experiment)
    if latest is not None and latest.nodes == draft.nodes and latest.config == draft.config:
        return latest
    number = latest.number + 1 if latest else 1
    while True:
        record = draft.model_copy(update={"number": number})
        if store.create_record(f"runs/{draft.experiment}/{number}.json", record):
            return record
        number += 1


class Ref(Config):
    """A readable name's target."""

    kind: str
    key: str


def set_ref(store: Store, name: str, kind: str, key: str) -> None:
    """Point a name such as `cifar10/2/student` at an artifact. Earlier targets stay readable as history.

    A move is a compare-and-swap: number n + 1 is created only if nobody else did since n was read, else read again.
    """
    target = Ref(kind=kind, key=key)
    while True:
        numbers = _numbers_of_ref(store, name)
        newest = numbers[-1] if numbers else 0
        if numbers and store.read_as(f"refs/{name}/@{newest}.json", Ref) == target:
            return
        if store.create_record(f"refs/{name}/@{newest + 1}.json", target):
            return


def resolve_ref(store: Store, name: str) -> Ref:
    """The artifact that a name points at now, or pointed at (`name@2`). Raises UserError where there is none."""
    base, _, number = name.partition("@")
    numbers = _numbers_of_ref(store, base)
    wanted = int(number) if number.isdecimal() else (numbers[-1] if numbers and not number else 0)
    if wanted not in numbers:
        known = sorted({path.removeprefix("refs/").rsplit("/", 1)[0] for path in store.paths("refs")})
        raise UserError(f"no ref {name!r} in {store.url}; refs there: {', '.join(known) or 'none'}")
    return store.read_as(f"refs/{base}/@{wanted}.json", Ref)


def _numbers_of_ref(store: Store, name: str) -> list[int]:
    prefix = f"refs/{name}/@"
    stems = [
        path.removeprefix(prefix).removesuffix(".json")
        for path in store.paths(f"refs/{name}")
        if path.startswith(prefix)
    ]
    return sorted(int(stem) for stem in stems if stem.isdecimal())
