"""What an evaluator is: a stage whose artifact is an `evaluation`, and what tables say of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from storage.keys import Config
from tasks.contract import Stage


class EvaluatorConfig(Config):
    """Settings of an evaluator. One that reads files outside the store says which, and what tells that they changed."""

    def external(self) -> str:
        """What names those files; empty: there are none."""
        return ""

    def fingerprint(self) -> str:
        """The identity of those files; empty: there are none. Raises UserError where they are not there."""
        return ""


@dataclass(frozen=True)
class Headline:
    """The number that stands for an evaluation in a table of models: a share in [0, 1], larger is better."""

    title: str
    value: float


@dataclass(frozen=True)
class Evaluator(Stage):
    """One row of the table of evaluators.

    `short`: its name on the command line and in a recipe's `evaluate` section; `headline`: of an artifact's metrics;
    `data`: whether it measures on images of a data set, and not on those of an archive.
    """

    short: str
    headline: Callable[[dict[str, Any]], Headline | None]
    data: bool = True
