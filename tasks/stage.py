"""Every stage goes through here: look the key up, reuse what is there, else run the stage and commit its artifact.

`run_stage` is the plain function; `stage_task` is the one Prefect task around it (Prefect is imported on first use).
"""

import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from models.compute import ComputeConfig, OfferPieces, open_engine
from models.failures import WorkerFailed, WorkerLost
from models.launch import code_state
from models.numerics import resolve_device
from models.versions import package_versions
from storage.artifacts import SOURCE_ROLE, Manifest, commit, discard_attempt, find, get
from storage.errors import StoreAway, UserError
from storage.keys import Config
from storage.objects import Store
from storage.runs import NodeRecord
from tasks.contract import OnProgress, Stage, StageContext

FIRST_DELAY_S, LONGEST_DELAY_S = 10.0, 3600.0


@dataclass(frozen=True)
class StageOutcome:
    """The artifact, and whether it was there already."""

    manifest: Manifest
    reused: bool


Announce = Callable[["StageRequest"], AbstractContextManager[Callable[[StageOutcome], None]]]


@contextmanager
def unannounced(request: "StageRequest") -> Iterator[Callable[[StageOutcome], None]]:
    """Tell nobody of a stage."""
    yield lambda outcome: None


@dataclass(frozen=True)
class StageRequest:
    """One stage to be done: its identity, its whole config (fields outside the key too) and its inputs' kinds.

    `announce` is entered where an attempt at the stage begins and left where it ends, with an error or without; what it
    yields is given the outcome. It must not fail.
    """

    store: str
    record: NodeRecord
    stage: Stage
    config: Config
    input_kinds: dict[str, str]
    compute: ComputeConfig
    prefect_run: str = ""
    announce: Announce = unannounced


DoStage = Callable[[StageRequest], StageOutcome]


def run_stage(
    request: StageRequest,
    on_progress: OnProgress = lambda progress: None,
    on_log: Callable[[str], None] = lambda line: None,
    offer: OfferPieces | None = None,
) -> StageOutcome:
    """Return the stage's artifact, made now or before. `offer`: how a cluster's pieces may be handed out.

    A failure leaves parts and checkpoints for the next attempt; UserError and WorkerFailed say which stage and artifact.
    """
    with request.announce(request) as tell:
        outcome = _reuse_or_make(request, on_progress, on_log, offer)
        tell(outcome)
    return outcome


def _reuse_or_make(
    request: StageRequest, on_progress: OnProgress, on_log: Callable[[str], None], offer: OfferPieces | None
) -> StageOutcome:
    store, record = Store(request.store), request.record
    existing = find(store, record.kind, record.key)
    if existing is not None:
        return StageOutcome(existing, reused=True)
    inputs = {role: get(store, kind, record.inputs[role]) for role, kind in request.input_kinds.items()}
    engine = open_engine(request.compute, on_log, offer)
    source = record.inputs.get(SOURCE_ROLE, "")
    context = StageContext(store, record.key, engine, request.compute, on_progress, record.name, source)
    started = time.perf_counter()
    try:
        result = request.stage.run(context, request.config, inputs)
    except (UserError, WorkerFailed) as error:
        raise type(error)(f"{record.name} ({record.kind} {record.key[:12]}): {error}") from error
    manifest = Manifest(
        kind=record.kind,
        key=record.key,
        stage=record.stage,
        stage_version=record.version,
        generation=record.generation,
        config=record.config,
        inputs=record.inputs,
        files=result.files,
        metrics=result.metrics,
        provenance={**_provenance(request), **result.facts, "seconds": round(time.perf_counter() - started, 3)},
    )
    committed = commit(store, manifest)
    discard_attempt(store, record.kind, record.key, context.attempt)
    return StageOutcome(committed, reused=False)


class Watch(Protocol):
    """Looks on while a stage's task runs: entered and left within the task run, which it must not disturb."""

    def __enter__(self) -> Self:
        """The stage begins."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """The stage is over, with an error or without."""

    def progress(self, progress: dict[str, Any]) -> None:
        """`done` of `total` `unit`; called from any thread."""

    def made(self, outcome: StageOutcome) -> str:
        """The artifact is there. Returns the name of the page that shows it."""
        ...


def may_pass(error: object) -> bool:
    """Whether the same stage may succeed a little later. A mistake of the user's or a fault of the code's does not pass."""
    return isinstance(error, StoreAway | WorkerLost)


def retry_delays(retries: int) -> list[float]:
    """Seconds before each further attempt: 10, 40, 160 and so on, at most an hour."""
    return [min(FIRST_DELAY_S * 4.0**number, LONGEST_DELAY_S) for number in range(retries)]


def stage_task(retries: int, on_retry: Callable[[str], None], offer: OfferPieces | None = None) -> Any:
    """The Prefect task: `run_stage`, ending in the state `Reused` where the artifact was there already.

    What may pass (`may_pass`) is tried again so often, and goes on where it was; `on_retry` gets a line that says so.
    """
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    delays = retry_delays(retries)

    def passes(task: object, task_run: Any, state: Any) -> bool:
        """Asked by Prefect where an attempt failed and another is left."""
        again = may_pass(state.data)
        if again:
            cause = str(state.data).splitlines()[0]
            delay = delays[min(task_run.run_count, retries) - 1]  # a run that crashed and goes on counts on
            on_retry(f"{task_run.name} is tried again in {delay:.0f} s, and goes on where it was: {cause}")
        return again

    @task(
        name="stage",
        task_run_name="{name}",
        persist_result=False,
        cache_policy=NO_CACHE,
        retries=retries,
        retry_delay_seconds=delays,
        retry_condition_fn=passes,
    )
    def stage(name: str, request: StageRequest, watch: Watch, on_log: Callable[[str], None]) -> Any:
        with watch:
            outcome = run_stage(request, watch.progress, on_log, offer)
            page = watch.made(outcome)
        if not outcome.reused:
            return outcome
        manifest = outcome.manifest
        message = f"{manifest.kind} {manifest.key} was in the store; the artifact {page} shows it"
        return Completed(name="Reused", message=message, data=outcome)

    return stage


def missing_inputs(store: Store, record: NodeRecord, kinds: dict[str, str]) -> list[str]:
    """The roles whose artifacts are not in the store."""
    return [role for role, kind in kinds.items() if find(store, kind, record.inputs[role]) is None]


def _provenance(request: StageRequest) -> dict[str, Any]:
    return {
        "code": code_state(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "device": resolve_device(request.compute),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "prefect_run": request.prefect_run,
    }
