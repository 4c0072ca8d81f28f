"""What matters of an artifact, in a few words: counts, accuracy, code."""

from collections.abc import Mapping
from typing import Any

from storage.artifacts import Manifest
from storage.errors import StoreError
from storage.lineage import Lineage
from tasks.evaluators import headline_of
from tasks.sources import SPLITS

COMMIT_DIGITS = 7


def artifact_facts(manifest: Manifest) -> str:
    """What matters most of an artifact, with commas between; empty where its numbers are not there."""
    metrics = manifest.metrics
    facts = {
        "dataset": lambda: ", ".join(_split(s, metrics[s]) for s in SPLITS if s in metrics),
        "model": lambda: _learned(metrics) + f"{metrics['num_parameters']:,} parameters",
        "labels": lambda: f"{metrics['images']:,} images, mean confidence {metrics['mean_confidence']:.2f}",
        "selection": lambda: (
            f"{metrics['kept']:,} kept, {metrics['dropped']:,} dropped, {metrics['duplicated']:,} duplicated"
            + _empty_classes(metrics["per_class"]["kept"])
        ),
        "evaluation": lambda: _measured(manifest),
        "report": lambda: manifest.file("report.html").path,
    }
    try:
        return facts[manifest.kind]()
    except (KeyError, StoreError):
        return ""


def tested_top1(lineage: Lineage, key: str) -> float | None:
    """A model's top-1 on the test images, in [0, 1], as the evaluation that was made of it says; None where none was."""
    for role, user in lineage.users.get(key, ()):
        manifest = lineage.nodes[user].manifest
        if role == "model" and manifest is not None and manifest.stage == "evaluate":
            return manifest.metrics.get("test", {}).get("top1")
    return None


def code_of(manifest: Manifest) -> str:
    """The commit of the program that made it, `+` where its tree was changed; empty where it is not known."""
    code: dict[str, Any] = manifest.provenance.get("code") or {}
    commit = str(code.get("commit", ""))[:COMMIT_DIGITS]
    return f"{commit}+" if commit and code.get("dirty") else commit


def numbers_of(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among an artifact's metrics by their dotted names, `test.top1`; lists are left out."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = value
    return found


def _learned(metrics: Mapping[str, Any]) -> str:
    """Top-1 at the end of a training; of weights from outside nothing."""
    return f"val top-1 {metrics['val_top1']:.2%}, " if "val_top1" in metrics else ""


def _measured(evaluation: Manifest) -> str:
    """The number that stands for an evaluation."""
    headline = headline_of(evaluation)
    if headline is None:
        return evaluation.stage
    split = f"{evaluation.metrics.get('split', 'test')} "
    return f"{split}{headline.title} {headline.value:.2%}"


def _empty_classes(kept: list[int]) -> str:
    """Said where classes stay empty, because they were to be skipped or have no image at all."""
    empty = sum(not count for count in kept)
    return f", {empty:,} of {len(kept):,} classes empty" if empty else ""


def _split(name: str, counts: dict[str, int]) -> str:
    """A split's images, and those that were left out."""
    left_out = [f"{counts[fate]:,} {fate}" for fate in ("rejected", "leaked") if counts.get(fate)]
    return f"{counts['images']:,} {name}" + (f" ({', '.join(left_out)})" if left_out else "")
