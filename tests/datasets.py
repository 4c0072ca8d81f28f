"""Data sets made by the real stages `prepare` and `unlabeled`, for the tests of what comes after them."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from models.worker import Worker
from storage.artifacts import Manifest
from tasks.contract import StageContext, StageResult
from tasks.prepare import PrepareConfig, prepare
from tasks.unlabeled import UnlabeledConfig, unlabeled


class HereEngine:
    """Runs the work in this process, one piece after the other: for tests of what is made, not of how it is spread."""

    processes = 1

    def map(
        self, function: str, specs: Sequence[dict[str, Any]], on_progress: Callable[[dict[str, Any]], None]
    ) -> list[dict[str, Any]]:
        """As LocalEngine does, without a child."""
        module, _, name = function.partition(":")
        return [getattr(import_module(module), name)(spec, Worker()) for spec in specs]

    def gang(
        self, function: str, spec: dict[str, Any], world: int, on_progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """One rank."""
        return self.map(function, [spec], on_progress)[0]


def prepare_all(context: StageContext, root: Path | str, **fields: Any) -> StageResult:
    """Both data sets of an experiment as one result with all four splits."""
    settings = {"root": str(root), **fields}
    labeled = prepare(context, PrepareConfig(**settings), {})
    data = Manifest(
        kind="dataset", key="k", stage="prepare", stage_version=1, config={}, inputs={}, files=labeled.files, metrics=labeled.metrics
    )  # fmt: skip
    rest = unlabeled(context, UnlabeledConfig(**settings), {"data": data})
    return StageResult((*labeled.files, *rest.files), {**rest.metrics, **labeled.metrics})
