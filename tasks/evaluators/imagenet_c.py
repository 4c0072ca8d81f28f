"""evaluate-imagenet-c: the published corrupted images; raw errors, and mCE by AlexNet's mean errors.

The images are stored as the networks of the benchmark saw them, 224 x 224 pixels: they are seen whole, resized to the model's own size where
that is another one, and not cropped again.
"""

from typing import Any

from pydantic import Field

from storage.artifacts import Manifest
from storage.errors import UserError
from tasks.contract import StageContext, StageResult
from tasks.evaluators.altered import Alteration, Asked, predict_altered
from tasks.evaluators.archives import Archive, ArchiveConfig, labeled
from tasks.evaluators.contract import Headline
from tasks.evaluators.corrupted import errors_of, summary
from tasks.metrics.corruption import ALEXNET, KINDS, SEVERITIES, corruption_errors, mean_corruption_error

VERSION = 1


class ImageNetCConfig(ArchiveConfig):
    """KIND/SEVERITY/CLASS/IMAGE below `root`."""

    kinds: tuple[str, ...] = Field(KINDS, min_length=1, description="corruptions, by the names of their folders")


def evaluate(context: StageContext, config: ImageNetCConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Measure `inputs["model"]` on the images below `config.root`."""
    model, archive = inputs["model"], Archive(config.root)
    asked = []
    for kind, by_severity in kinds_of(archive, config.kinds).items():
        for severity, by_class in by_severity.items():
            files, labels = labeled(model, archive, by_class)
            for number, own in enumerate(archive.stretches(files, labels, f"{kind} {severity}")):
                variant = {"kind": kind, "severity": severity}
                asked.append(Asked(own, variant, f"{kind}/{severity}/{number:05d}", kind))
    predicted = predict_altered(context, "evaluate-imagenet-c", model, Alteration({"name": "none"}, stored=True), asked)
    errors = errors_of(asked, predicted.tables(context))
    metrics: dict[str, Any] = {"images": sum(piece.images.count for piece in asked), **summary(errors)}
    if set(errors) <= set(ALEXNET):
        ces = corruption_errors(errors)
        metrics |= {"corruption_errors": ces, "mce": mean_corruption_error(ces)}
    return StageResult(predicted.files, metrics, {"numerics": predicted.numerics})


def kinds_of(archive: Archive, kinds: tuple[str, ...]) -> dict[str, dict[int, dict[str, list[Any]]]]:
    """The files by kind, severity and class. Raises UserError where a kind or severity is missing, or an image of one."""
    found: dict[str, dict[int, dict[str, list[Any]]]] = {kind: {} for kind in kinds}
    for (kind, severity, name), files in archive.by_folder(3).items():
        if kind in found and severity.isdecimal():
            found[kind].setdefault(int(severity), {}).setdefault(name, []).extend(files)
    absent = [kind for kind, own in found.items() if not own]
    if absent:
        raise UserError(
            f"root={archive.root} has no folder {', '.join(absent)}; unpack that part of the archive, or set kinds to those "
            f"there are"
        )
    for kind, own in found.items():
        missing = sorted(set(SEVERITIES) - set(own))
        if missing:
            raise UserError(
                f"root={archive.root}: {kind} has no severity {', '.join(map(str, missing))}, and a corruption's error is a mean "
                f"over all five; unpack {kind} again, or leave it out of kinds"
            )
        counts = {severity: sum(map(len, by_class.values())) for severity, by_class in own.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{severity}: {count:,}" for severity, count in sorted(counts.items()))
            raise UserError(
                f"root={archive.root}: {kind} has another number of images at each severity ({told}); unpack it again"
            )
    return {kind: dict(sorted(own.items())) for kind, own in found.items()}


def headline(metrics: dict[str, Any]) -> Headline | None:
    """Top-1 over all corruptions and severities."""
    return Headline("ImageNet-C", metrics["top1"])
