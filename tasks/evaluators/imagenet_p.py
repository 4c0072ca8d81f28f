"""evaluate-imagenet-p: published sequences of slightly changed images; how often the predicted class flips, and how far ranks move.

Raw flip probabilities and top-5 distances by perturbation. What they are divided by for mFR (AlexNet's in the benchmark, whose numbers
were not published with its code) is another evaluation of this kind, named when models are compared.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from storage.artifacts import Manifest
from storage.errors import UserError
from tasks.contract import StageContext, StageResult
from tasks.evaluators.altered import Alteration, Asked, predict_altered, ranked_classes
from tasks.evaluators.archives import VIDEO_SUFFIXES, Archive, ArchiveConfig, labeled
from tasks.evaluators.contract import Headline
from tasks.metrics.perturbation import flip_probability, top5_distance

VERSION = 1
KINDS = (
    "gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "snow", "brightness", "translate", "rotate", "tilt",
    "scale",
)  # fmt: skip
FRAMES = 31  # of most sequences (translate: 41); for counts of work only


class ImageNetPConfig(ArchiveConfig):
    """KIND/CLASS/VIDEO.mp4 below `root`."""

    kinds: tuple[str, ...] = Field(KINDS, min_length=1, description="perturbations, by the names of their folders")
    difficulty: int = Field(
        1, ge=1, le=3, description="2, 3: frames so far apart are compared; of noises the folders KIND_2, KIND_3"
    )

    def suffixes(self) -> tuple[str, ...]:
        """Videos."""
        return VIDEO_SUFFIXES


def evaluate(context: StageContext, config: ImageNetPConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Measure `inputs["model"]` on the videos below `config.root`."""
    model, archive = inputs["model"], Archive(config.root, VIDEO_SUFFIXES)
    by_folder, asked = archive.by_folder(2), []
    for kind in config.kinds:
        folder = f"{kind}_{config.difficulty}" if is_noise(kind) and config.difficulty > 1 else kind
        by_class = {name: files for (found, name), files in by_folder.items() if found == folder}
        if not by_class:
            raise UserError(
                f"root={config.root} has no folder {folder}; unpack that part of the archive, or set kinds to those there are"
            )
        files, labels = labeled(model, archive, by_class)
        for number, own in enumerate(archive.stretches(files, labels, folder)):
            asked.append(Asked(own, {"kind": kind}, f"{kind}/{number:05d}", kind))
    predicted = predict_altered(context, "evaluate-imagenet-p", model, Alteration({"name": "none"}, stored=True), asked)
    by_kind: dict[str, list[pa.Table]] = {}
    for piece, table in zip(asked, predicted.tables(context), strict=True):
        by_kind.setdefault(piece.variant["kind"], []).append(table)
    metrics = {"difficulty": config.difficulty, **stability(by_kind, config.difficulty)}
    return StageResult(predicted.files, metrics, {"numerics": predicted.numerics})


def stability(by_kind: dict[str, list[pa.Table]], difficulty: int = 1) -> dict[str, Any]:
    """Flip probabilities and top-5 distances by kind, and their means. Sequences of other lengths are taken as they are."""
    flips, distances, sequences = {}, {}, 0
    for kind, tables in by_kind.items():
        groups = [own for table in tables for own in _by_length(table)]
        weights = [len(own) for own in groups]
        noise = is_noise(kind)
        flips[kind] = float(
            np.average([flip_probability(own[..., 0], noise, difficulty) for own in groups], weights=weights)
        )
        distances[kind] = float(np.average([top5_distance(own, noise, difficulty) for own in groups], weights=weights))
        sequences += sum(weights)
    return {
        "images": sequences,
        "flips": flips,
        "mean_flip": float(np.mean(list(flips.values()))),
        "top5_distances": distances,
        "mean_top5_distance": float(np.mean(list(distances.values()))),
    }


def is_noise(kind: str) -> bool:
    """Whether a perturbation's frames have no order, so that each is compared with the first."""
    return "noise" in kind


def headline(metrics: dict[str, Any]) -> Headline | None:
    """How often a frame's class is that of the one before it, over all perturbations."""
    return Headline("unflipped", 1 - metrics["mean_flip"])


def _by_length(table: pa.Table) -> list[np.ndarray]:
    """The ranked classes of sequences, int [sequences, frames, k], those of a length together."""
    ranked, first = ranked_classes(table), np.flatnonzero(table["frame"].to_numpy() == 0)
    ends = np.append(first[1:], len(table))
    groups: dict[int, list[np.ndarray]] = {}
    for start, end in zip(first, ends, strict=True):
        groups.setdefault(int(end - start), []).append(ranked[start:end])
    return [np.stack(own) for own in groups.values()]
