"""Data sets made by the real stages `prepare` and `unlabeled`, for the tests of what comes after them."""

from pathlib import Path
from typing import Any

from storage.artifacts import Manifest
from tasks.contract import StageContext, StageResult
from tasks.prepare import PrepareConfig, prepare
from tasks.unlabeled import UnlabeledConfig, unlabeled


def prepare_all(context: StageContext, root: Path | str, **fields: Any) -> StageResult:
    """Both data sets of an experiment as one result with all four splits."""
    settings = {"root": str(root), **fields}
    labeled = prepare(context, PrepareConfig(**settings), {})
    data = Manifest(
        kind="dataset", key="k", stage="prepare", stage_version=1, config={}, inputs={}, files=labeled.files, metrics=labeled.metrics
    )  # fmt: skip
    rest = unlabeled(context, UnlabeledConfig(**settings), {"data": data})
    return StageResult((*labeled.files, *rest.files), {**rest.metrics, **labeled.metrics})
