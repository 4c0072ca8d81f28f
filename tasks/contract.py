"""The stage contract: a stage takes a config and input artifacts, and returns the files and metrics of one artifact."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from models.compute import ComputeConfig, Engine
from storage.artifacts import FileEntry, Manifest
from storage.keys import Config
from storage.objects import Store

OnProgress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StageContext:
    """What a stage gets besides its config and inputs. Nothing here may change its result; `name` is for people,
    `source` the fingerprint of external data in the stage's key."""

    store: Store
    key: str
    engine: Engine
    compute: ComputeConfig
    on_progress: OnProgress = lambda progress: None
    name: str = ""
    source: str = ""
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)

    def progress_of(self, total: int, unit: str = "images") -> OnProgress:
        """A listener for `Engine.map` that knows the total of all pieces of work."""
        return lambda progress: self.on_progress({**progress, "total": total, "unit": unit})


@dataclass(frozen=True)
class StageResult:
    """The files and metrics of the artifact; `facts` (timings and the like) go to its provenance, not its content."""

    files: tuple[FileEntry, ...]
    metrics: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One row of the table of stages.

    `version` is raised when the meaning of the stage or a default changes; `run` is its plain function.
    """

    name: str
    version: int
    kind: str
    config: type[Config]
    run: Callable[[StageContext, Any, dict[str, Manifest]], StageResult]
