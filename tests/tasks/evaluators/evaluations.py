"""Evaluators on tiny real artifacts, in this process: for tests of what is measured, not of where."""

from collections.abc import Callable, Sequence
from typing import Any

from storage.artifacts import Manifest, commit
from storage.keys import digest
from storage.objects import Store
from tasks.contract import StageContext, StageResult
from tasks.evaluators import BY_SHORT
from tests.datasets import HereEngine
from tests.models.artifacts import COMPUTE


class CountingEngine(HereEngine):
    """Runs the work here and remembers how many pieces were asked for in each group; ends after so many groups."""

    def __init__(self, most_jobs: int | None = None) -> None:
        self.jobs: list[dict[str, Any]] = []
        self._most = most_jobs

    def map(
        self, function: str, specs: Sequence[dict[str, Any]], on_progress: Callable[[dict[str, Any]], None]
    ) -> list[dict[str, Any]]:
        """One job after the other."""
        for spec in specs:
            for job in spec["jobs"]:
                if self._most is not None and len(self.jobs) == self._most:
                    raise KeyboardInterrupt
                self.jobs.append(job)
                super().map(function, [{**spec, "jobs": [job]}], on_progress)
        return [{} for _ in specs]


def evaluate(
    store: Store, short: str, inputs: dict[str, Manifest], engine: Any = None, compute: Any = COMPUTE, **config: Any
) -> Manifest:
    """The committed artifact of one evaluator."""
    evaluator = BY_SHORT[short]
    settings = evaluator.config.model_validate(config)
    roles = {role: manifest.key for role, manifest in inputs.items()}
    key = digest([evaluator.name, settings.model_dump(mode="json"), roles])
    context = StageContext(store, key, engine or HereEngine(), compute)
    result: StageResult = evaluator.run(context, settings, inputs)
    made = Manifest(
        kind="evaluation",
        key=key,
        stage=evaluator.name,
        stage_version=evaluator.version,
        config=settings.key_fields(),
        inputs=roles,
        files=result.files,
        metrics=result.metrics,
    )
    return commit(store, made)
