"""What a run shows in Prefect's UI: progress while a stage works, its page, the iteration's lineage, the run's results.

Keys: `digits-progress` (the stage at work), `digits-1-select` (a stage's page), `digits-1-lineage`, `digits-results`.
What Prefect's server does not take is a warning in the run's log and never the end of a stage.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeAlias, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import get_settings_context
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, PREFECT_UI_URL, temporary_settings
from prefect.utilities.context import get_task_and_flow_run_ids

from flows.console import Pace, progress_line
from flows.driver import Run
from flows.ui_lineage import iteration_of, lineage_page
from flows.ui_pages import RunView, results_page, stage_page
from storage.artifacts import Manifest, find
from tasks.contract import OnProgress
from tasks.inspection.facts import artifact_facts
from tasks.stage import StageOutcome, StageRequest

UPDATE_S = 5.0  # between two updates of a progress artifact: each is an event that the server keeps
REQUEST_S = 5.0
QUIET_S = 60.0  # after a failure nothing is sent: a server that is away shall not hold up every stage

Answer = TypeVar("Answer")
RunIds: TypeAlias = tuple[UUID | None, UUID | None]  # of a task run and its flow run


def artifact_key(experiment: str, name: str) -> str:
    """Prefect's name for a page: lowercase letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", f"{experiment}-{name}")


def ui_path(page: str) -> str:
    """Where Prefect's UI (its second version) shows a page, from the server's root."""
    base = urlsplit(PREFECT_UI_URL.value() or "").path.rstrip("/").removesuffix("/v2")
    return f"{base}/v2/{page}"


class ImpatientClient:
    """Prefect's client with one retry, by default there are five with pauses of a minute in all. For any thread.

    Making a client, and settings for it, takes many times the processor time of a request: so there is one for a run.
    """

    def __init__(self) -> None:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):
            self._settings = get_settings_context().model_copy()
        self._client: SyncPrefectClient | None = None
        self._lock = threading.Lock()

    def ask(self, request: Callable[[SyncPrefectClient], Answer]) -> Answer:
        """A request's answer. Raises what the client raises; the next request has a new one."""
        with self._settings.model_copy():  # a context can be entered once
            try:
                return request(self._opened())
            except Exception:
                self.close()
                raise

    def close(self) -> None:
        """Give the connections back."""
        with self._lock:
            if self._client is not None:
                with suppress(Exception):  # it may be what has failed
                    self._client.__exit__(None, None, None)
            self._client = None

    def _opened(self) -> SyncPrefectClient:
        with self._lock:
            if self._client is None:
                self._client = get_client(sync_client=True, httpx_settings={"timeout": REQUEST_S}).__enter__()
            return self._client


class RunPages:
    """The artifacts of one flow run. Made within it; to be closed, which waits for the last page.

    A thread draws them one after the other: the next stage does not wait for pictures of the one before.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._log, self._client = run, get_run_logger(), ImpatientClient()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pages")
        self._known: dict[str, Manifest] | None = None
        self._quiet_until = 0.0
        self._shown: dict[str, UUID] = {}  # what this run shows, by key

    def close(self) -> None:
        """Draw what is left to draw, then give the connections to Prefect's server back."""
        self._thread.shutdown()
        self._client.close()

    def watch(self, request: StageRequest, on_progress: OnProgress) -> "StageWatch":
        """What looks on while a stage's task runs; reports go on to `on_progress`."""
        return StageWatch(self, request, on_progress)

    def stage_done(self, name: str) -> None:
        """Have lineage and results brought up to date; called within the flow run, after the stage's task."""
        self._thread.submit(self._bring_up_to_date, name, get_task_and_flow_run_ids())

    def publish_page(self, name: str, outcome: StageOutcome) -> str:
        """Have a stage's page shown, a new version where the server's newest is of another artifact. Returns its key.

        Called within the stage's task.
        """
        self._thread.submit(self._publish_page, name, outcome, get_task_and_flow_run_ids())
        return self.key(name)

    def _bring_up_to_date(self, name: str, runs: RunIds) -> None:
        iteration = iteration_of(name)
        with self._harmless(f"the lineage of {name}"):
            view = self._view()
            if iteration is not None:
                page = lineage_page(view, self._run.nodes, iteration)
                self._keep_up(f"{iteration}/lineage", page, f"Iteration {iteration}: what was made from what", runs)
            if any(manifest.kind == "model" for manifest in view.manifests.values()):
                page = results_page(view)
                self._keep_up("results", page, "Top-1 of teacher and students, counts of pseudo labels", runs)

    def _publish_page(self, name: str, outcome: StageOutcome, runs: RunIds) -> None:
        key, manifest = self.key(name), outcome.manifest
        with self._harmless(f"the page of {name}"):
            description = f"{manifest.kind} {manifest.key[:12]}: {artifact_facts(manifest)}"
            self._known_artifacts()[name] = manifest
            artifact = self._find_shown(key, description) if outcome.reused else None
            if artifact is None and not self._is_quiet():
                artifact = self.create(key, "markdown", stage_page(self._view(), name), description, runs)
            if artifact is not None:
                self._shown[key] = artifact

    def key(self, name: str) -> str:
        """Prefect's name for a page of this run."""
        return artifact_key(self._run.experiment.name, name)

    def create(self, key: str, kind: str, data: Any, description: str, runs: RunIds) -> UUID | None:
        """A new artifact of the task run and flow run `runs`; None where it fails."""
        task_run, flow_run = runs
        wanted = ArtifactCreate(
            key=key, type=kind, description=description, data=data, task_run_id=task_run, flow_run_id=flow_run
        )
        created = self._send(key, lambda client: client.create_artifact(wanted))
        return created.id if created is not None else None

    def update(self, key: str, artifact: UUID, data: Any, description: str) -> None:
        """Replace what an artifact shows."""
        wanted = ArtifactUpdate(data=data, description=description)
        self._send(key, lambda client: client.update_artifact(artifact, wanted))

    def _keep_up(self, name: str, page: str, description: str, runs: RunIds) -> None:
        """Make an artifact of this run, or replace what it shows."""
        key = self.key(name)
        if key in self._shown:
            self.update(key, self._shown[key], page, description)
        elif (artifact := self.create(key, "markdown", page, description, runs)) is not None:
            self._shown[key] = artifact

    def _find_shown(self, key: str, description: str) -> UUID | None:
        """The newest page of that key, where it is of this artifact."""
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        found = self._send(
            key, lambda c: c.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC, limit=1)
        )
        return next((artifact.id for artifact in found or () if artifact.description == description), None)

    def _view(self) -> RunView:
        return RunView(self._run.experiment.name, self._run.store, self._known_artifacts(), self._link)

    def _link(self, name: str) -> str:
        """The page of a stage; of one that this run has not come to, the list of its pages."""
        key = self.key(name)
        return ui_path(f"artifacts/artifact/{self._shown[key]}" if key in self._shown else f"artifacts/key/{key}")

    def _known_artifacts(self) -> dict[str, Manifest]:
        """The artifacts of this run that are in the store: looked up once, then added to by the stages that are done."""
        if self._known is None:
            records = self._run.records
            found = {name: find(self._run.store, record.kind, record.key) for name, record in records.items()}
            self._known = {name: manifest for name, manifest in found.items() if manifest is not None}
        return self._known

    def _send(self, key: str, request: Callable[[Any], Answer]) -> Answer | None:
        if self._is_quiet():
            return None
        try:
            return self._client.ask(request)
        except Exception as error:  # whatever a server, a proxy or a network may say
            self._quiet_until = time.monotonic() + QUIET_S
            self._log.warning("Prefect's server did not take %s: %r; none is sent for %.0f s", key, error, QUIET_S)
            return None

    def _is_quiet(self) -> bool:
        return time.monotonic() < self._quiet_until

    @contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        """A page that cannot be made (its files are gone, a figure cannot be drawn) ends no stage."""
        try:
            yield
        except Exception:
            self._log.warning("%s could not be made for Prefect's UI", what, exc_info=True)


class StageWatch:
    """Publishes a stage's progress while its task runs, and its page at the end."""

    def __init__(self, pages: RunPages, request: StageRequest, on_progress: OnProgress) -> None:
        self._pages, self._name, self._on_progress = pages, request.record.name, on_progress
        self._pace, self._line, self._percent = Pace(), "", 0.0
        self._runs: RunIds = (None, None)
        self._artifact: UUID | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """An attempt at the stage; a further one, after a failure that may pass, has its own."""
        self._runs = get_task_and_flow_run_ids()
        self._thread, self._over = None, threading.Event()
        return self

    def progress(self, progress: dict[str, Any]) -> None:
        """Hand a report on, and note it for the thread that publishes one now and then."""
        self._on_progress(progress)
        self._line = progress_line(progress, self._pace.rate(progress, time.monotonic()))
        self._percent = round(min(100.0, 100.0 * progress["done"] / max(progress["total"], 1)), 1)
        if self._thread is None:
            self._thread = threading.Thread(target=self._publish_now_and_then, daemon=True)
            self._thread.start()

    def made(self, outcome: StageOutcome) -> str:
        """Publish the stage's page."""
        return self._pages.publish_page(self._name, outcome)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join(2 * REQUEST_S)
        if not self._thread.is_alive():
            self._percent = self._percent if kind else 100.0
            how = (
                f"failed: {str(error).splitlines()[0]}"
                if error and str(error)
                else "was stopped"
                if kind
                else "is done"
            )
            self._publish(f"{self._name} {how}; {self._line}")

    def _publish_now_and_then(self) -> None:
        while True:
            self._publish(f"{self._name} {self._percent:.0f} %: {self._line}")
            if self._over.wait(UPDATE_S):
                return

    def _publish(self, description: str) -> None:
        key = self._pages.key("progress")
        if self._artifact is None:
            self._artifact = self._pages.create(key, "progress", self._percent, description, self._runs)
        else:
            self._pages.update(key, self._artifact, self._percent, description)
