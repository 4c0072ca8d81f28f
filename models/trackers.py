"""Where a training's numbers go while it runs, besides the console and the artifact: TensorBoard, MLflow, W&B.

Only what is asked for is imported. A tracker gets `log(step, row)` with plain numbers, and `close()`.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from storage.errors import UserError

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


class Tracker(Protocol):
    """Takes the numbers of some steps."""

    def log(self, step: int, row: dict[str, float]) -> None:
        """The numbers after `step` steps, by name: loss_labeled, val_top1 and so on."""

    def close(self) -> None:
        """The training is over or was stopped."""


def check_installed(names: Iterable[str]) -> None:
    """Raise UserError where a tracker that is asked for is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"compute.trackers names {name}, but the package {PACKAGES[name]} is not installed; install it or remove {name}"
            )


def open_trackers(
    names: Iterable[str], run: str, folder: Path, first_step: int, config: dict[str, Any]
) -> list[Tracker]:
    """A tracker for each name. `run` names the training; `folder` is for event files; steps go on from `first_step`."""
    return [_OPEN[name](run, folder, first_step, config) for name in names]


class _TensorBoard:
    def __init__(self, _run: str, folder: Path, first_step: int, _config: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        # what an attempt that was killed wrote past its last checkpoint is hidden; a file's name is otherwise the second
        # in which it was opened, and a resume within that second would write over the file of the attempt before
        own = f".{first_step:09d}.{os.getpid()}"
        purged = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purged, filename_suffix=own)

    def log(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, run: str, _folder: Path, _first_step: int, config: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=run)
        mlflow.log_dict(config, "config.json")

    def log(self, step: int, row: dict[str, float]) -> None:
        self._mlflow.log_metrics(row, step=step)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a tracking server that is gone is no reason to lose a trained network
            self._mlflow.end_run()


class _WeightsAndBiases:
    def __init__(self, run: str, folder: Path, _first_step: int, config: dict[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="noisy-student", name=run, id=run.replace("/", "-"), resume="allow", config=config, dir=str(folder)
        )

    def log(self, step: int, row: dict[str, float]) -> None:
        self._run.log(row, step=step)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._run.finish()


_OPEN: dict[str, Any] = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _WeightsAndBiases}
