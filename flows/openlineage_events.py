"""What the OpenLineage events of a run and its stages say; how they are sent is in `flows/openlineage_sender.py`.

The job `digits` is the experiment, `digits.1/select` one of its stages, whose run has the experiment's as its parent. An
artifact is a data set named by the place where it lies, its key is its version; so are the files outside the store.
A stage that was reused has events too, marked so: a receiver that was not there when the artifact was made learns what
it was made from, and the graph has no holes. Loads the client.
"""

import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attr
import pyarrow as pa
from openlineage.client.event_v2 import (
    InputDataset,
    Job,
    OutputDataset,
    Run,
    RunEvent,
    RunState,
    set_producer,
)
from openlineage.client.facet_v2 import (
    DatasetFacet,
    JobFacet,
    OutputDatasetFacet,
    RunFacet,
    dataset_version_dataset,
    documentation_dataset,
    documentation_job,
    error_message_run,
    job_type_job,
    output_statistics_output_dataset,
    parent_run,
    processing_engine_run,
    schema_dataset,
    source_code_location_job,
)
from openlineage.client.git import get_git_repo_url
from openlineage.client.uuid import generate_static_uuid

from models.configs import TrainConfig
from models.launch import code_state
from models.predictions import PREDICTIONS_SCHEMA, probabilities_schema
from models.pretrained import HUB, LOCAL
from models.versions import package_versions
from storage.artifacts import SOURCE_ROLE, Manifest, artifact_folder
from storage.keys import Config
from storage.local import local_root
from storage.objects import Store
from storage.places import outside
from storage.shards import INDEX_SCHEMA
from tasks.evaluators.archives import ArchiveConfig
from tasks.imported import ImportConfig
from tasks.ingest import DataConfig
from tasks.inspection.facts import artifact_facts, numbers_of
from tasks.selection.shards import SELECTION_SCHEMA
from tasks.stage import StageOutcome, StageRequest
from tasks.unlabeled import UnlabeledConfig

PROGRAM = "noisy-student"
FACET = "noisyStudent_stage"
FACET_SCHEMA = "urn:noisy-student:openlineage-stage-facet:1-0-0"  # the `$id` of docs/openlineage-stage-facet.json
ROWS_IN = {"dataset": "shards/", "selection": "shards/", "labels": "predictions/"}  # of a kind of artifact
REMOTE = re.compile(r"(https?|ssh|git)://|git@")

Send = Callable[[Callable[[], RunEvent]], None]


@attr.define
class StageRunFacet(RunFacet):
    """What is said of an attempt at a stage beyond OpenLineage's own facets: docs/openlineage-stage-facet.json."""

    ref: str
    stage: str
    key: str
    generation: int
    settings: dict[str, Any]
    code: dict[str, Any]
    run: str | None = None
    prefectRun: str | None = None
    reused: bool | None = None
    numbers: dict[str, float] | None = None

    @staticmethod
    def _get_schema() -> str:
        return f"{FACET_SCHEMA}#/$defs/StageRunFacet"


@dataclass(frozen=True)
class _Said:
    """What an event says of its job, beside run and time."""

    job: dict[str, JobFacet]
    run: dict[str, RunFacet] = field(default_factory=dict)
    inputs: Sequence[InputDataset] = ()
    outputs: Sequence[OutputDataset] = ()


class RunEvents:
    """The events of an experiment's run, or of single stages. `send` takes what builds an event, so that nobody waits."""

    def __init__(self, send: Send, store: Store, experiment: str, run: str = "") -> None:
        version = package_versions((PROGRAM,))[PROGRAM].replace(" ", "-")
        set_producer(f"urn:{PROGRAM}:{version}")
        self._send, self._store, self._experiment, self._run = send, store, experiment, run
        self._namespace = os.environ.get("OPENLINEAGE_NAMESPACE") or store.url
        self._engine = processing_engine_run.ProcessingEngineRunFacet(version=version, name=PROGRAM)
        self._parent: dict[str, RunFacet] = {}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The run as a whole; stages within are its children."""
        begun = datetime.now(UTC)
        run_id = self._run_id(self._experiment, begun)
        parent = parent_run.Job(namespace=self._namespace, name=self._experiment)
        self._parent = {"parent": parent_run.ParentRunFacet(run=parent_run.Run(runId=run_id), job=parent)}
        about = f"The experiment {self._experiment} of Noisy Student Training"
        with self._cycle(self._experiment, begun, lambda outcome: _Said(job_facets("DAG", about))):
            yield

    @contextmanager
    def stage(self, request: StageRequest) -> Iterator[Callable[[StageOutcome], None]]:
        """An attempt at a stage; what this yields is given the outcome. To be a request's `announce`."""
        name = f"{self._experiment}.{request.record.name}"

        def say(outcome: StageOutcome | None) -> _Said:
            about = inspect.getdoc(inspect.getmodule(request.stage.run)) or request.stage.name
            facet = stage_facet(f"{self._experiment}/{request.record.name}", self._run, request, outcome)
            inputs = [self._input(request, role, key) for role, key in request.record.inputs.items()]
            outputs = [] if outcome is None else [output_dataset(self._store, outcome)]
            return _Said(job_facets("TASK", about.partition("\n")[0]), {FACET: facet, **self._parent}, inputs, outputs)

        with self._cycle(name, datetime.now(UTC), say) as tell:
            yield tell

    @contextmanager
    def _cycle(
        self, job: str, begun: datetime, say: Callable[[StageOutcome | None], _Said]
    ) -> Iterator[Callable[[StageOutcome], None]]:
        """START now; at the end COMPLETE, FAIL with the cause, or ABORT where the process was asked to stop."""
        run_id = self._run_id(job, begun)
        outcomes: list[StageOutcome] = []

        def send(kind: RunState, outcome: StageOutcome | None = None, **more: RunFacet) -> None:
            when = datetime.now(UTC)
            self._send(lambda: self._event(kind, when, run_id, job, say(outcome), more))

        send(RunState.START)
        try:
            yield outcomes.append
        except Exception as error:
            send(RunState.FAIL, errorMessage=error_facet(error))
            raise
        except BaseException:
            send(RunState.ABORT)
            raise
        send(RunState.COMPLETE, outcomes[0] if outcomes else None)

    def _event(
        self, kind: RunState, when: datetime, run_id: str, job: str, said: _Said, more: dict[str, RunFacet]
    ) -> RunEvent:
        return RunEvent(
            eventType=kind,
            eventTime=when.isoformat(),
            run=Run(run_id, {"processing_engine": self._engine, **said.run, **more}),
            job=Job(self._namespace, job, said.job),
            inputs=list(said.inputs),
            outputs=list(said.outputs),
        )

    def _run_id(self, job: str, begun: datetime) -> str:
        """A UUIDv7, as the specification advises, that is a function of run, job and the attempt's beginning alone."""
        return str(generate_static_uuid(begun, f"{self._namespace} {job} {self._run}".encode()))

    def _input(self, request: StageRequest, role: str, key: str) -> InputDataset:
        """An artifact, or the files outside the store; of both the version is what the manifest has."""
        if role == SOURCE_ROLE:
            namespace, name = outside_place(request.config)
        else:
            namespace, name = place_of(self._store.location(artifact_folder(request.input_kinds[role], key)))
        return InputDataset(namespace, name, facets={"version": _version(key)})


def place_of(location: str) -> tuple[str, str]:
    """Namespace and name of what lies at a path or URL, by OpenLineage's rules for files and buckets."""
    if location.startswith("s3://"):
        bucket, _, name = location.removeprefix("s3://").partition("/")
        return f"s3://{bucket}", name or "/"
    return "file", str(local_root(location))


def outside_place(config: Config) -> tuple[str, str]:
    """Namespace and name of the files outside the store that a stage with this config reads."""
    if isinstance(config, DataConfig):
        if config.source == "digits":  # images that packages carry
            return PROGRAM, config.source
        own = config.unlabeled_root if isinstance(config, UnlabeledConfig) else ""
        return place_of(own or config.root)
    if isinstance(config, ArchiveConfig):
        return place_of(config.root)
    if isinstance(config, TrainConfig | ImportConfig):
        return _pretrained_place(config.pretrained)
    raise TypeError(f"{type(config).__name__} names no files outside the store")


def output_dataset(store: Store, outcome: StageOutcome) -> OutputDataset:
    """The artifact. How much was written is said only where it was."""
    manifest = outcome.manifest
    facets: dict[str, DatasetFacet] = {
        "version": _version(manifest.key),
        "documentation": documentation_dataset.DocumentationDatasetFacet(
            description=f"{manifest.kind} {manifest.key[:12]}: {artifact_facts(manifest)}"
        ),
    }
    columns = columns_of(manifest)
    if columns is not None:
        own = [schema_dataset.SchemaDatasetFacetFields(name=f.name, type=str(f.type)) for f in columns]
        facets["schema"] = schema_dataset.SchemaDatasetFacet(fields=own)
    namespace, name = place_of(store.location(artifact_folder(manifest.kind, manifest.key)))
    written: dict[str, OutputDatasetFacet] = {} if outcome.reused else {"outputStatistics": _statistics(manifest)}
    return OutputDataset(namespace, name, outputFacets=written, facets=facets)


def columns_of(manifest: Manifest) -> pa.Schema | None:
    """The columns of an artifact's tables: what is known of each image. None where it has no such table."""
    if manifest.kind == "labels":
        num_classes = len(manifest.metrics["class_names"])
        return pa.schema([*PREDICTIONS_SCHEMA, *probabilities_schema(num_classes, manifest.config.get("top_k", 0))])
    return {"dataset": INDEX_SCHEMA, "selection": SELECTION_SCHEMA}.get(manifest.kind)


def stage_facet(ref: str, run: str, request: StageRequest, outcome: StageOutcome | None) -> StageRunFacet:
    """Our own facet: identity and settings, defaults too, and with an outcome the numbers. Never a secret."""
    record, config = request.record, request.config
    return StageRunFacet(
        ref=ref,
        stage=record.stage,
        key=record.key,
        generation=record.generation,
        settings=config.model_dump(mode="json", exclude=set(config.not_in_key)),
        code=code_state(),
        run=run or None,
        prefectRun=request.prefect_run or None,
        reused=None if outcome is None else outcome.reused,
        numbers=None if outcome is None else numbers_of(outcome.manifest.metrics),
    )


def job_facets(kind: str, about: str) -> dict[str, JobFacet]:
    """What a job is, in words, and where its code lies, where that is known."""
    facets: dict[str, JobFacet] = {
        "jobType": job_type_job.JobTypeJobFacet(processingType="BATCH", integration="NOISY_STUDENT", jobType=kind),
        "documentation": documentation_job.DocumentationJobFacet(description=about),
    }
    location = source_location(Path(__file__).resolve().parent.parent, code_state())
    return facets if location is None else {**facets, "sourceCodeLocation": location}


def source_location(checkout: Path, code: dict[str, Any]) -> source_code_location_job.SourceCodeLocationJobFacet | None:
    """The remote of a git checkout, without a token that stands in it; None where there is none.

    The commit is said only of a tree that has no other changes.
    """
    url = get_git_repo_url(git_dir=checkout / ".git")
    if not url or not REMOTE.match(url):
        return None
    url = re.sub(r"//[^/@]*@", "//", url)
    version = None if code["dirty"] else code["commit"] or None
    return source_code_location_job.SourceCodeLocationJobFacet(type="git", url=url, repoUrl=url, version=version)


def error_facet(error: Exception) -> error_message_run.ErrorMessageRunFacet:
    """The cause in one line, and the trace."""
    trace = "".join(traceback.format_exception(error))
    message = str(error).partition("\n")[0] or type(error).__name__
    return error_message_run.ErrorMessageRunFacet(message=message, programmingLanguage="PYTHON", stackTrace=trace)


def _pretrained_place(source: str) -> tuple[str, str]:
    """A folder of this machine, or a repository of the Hugging Face hub, where timm's own weights lie too."""
    if source.startswith(LOCAL):
        return place_of(source.removeprefix(LOCAL))
    return HUB.rstrip(":"), source.removeprefix(HUB) if source.startswith(HUB) else f"timm/{source}"


def _version(key: str) -> dataset_version_dataset.DatasetVersionDatasetFacet:
    return dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=key)


def _statistics(manifest: Manifest) -> output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet:
    """Images, bytes and files of an artifact; files that it only reads where they lie do not count."""
    own = [entry for entry in manifest.files if not outside(entry.path)[0]]
    rows = None
    if manifest.kind in ROWS_IN:
        rows = sum(entry.rows or 0 for entry in manifest.files_under(ROWS_IN[manifest.kind]))
    return output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        rowCount=rows, size=sum(entry.bytes for entry in own), fileCount=len(own)
    )
