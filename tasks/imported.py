"""import: weights from outside become a model artifact, so that every evaluator runs on a timm name too."""

from typing import ClassVar

from pydantic import Field

from models.pretrained import locate
from storage.artifacts import FileEntry, Manifest
from storage.keys import Config, digest
from tasks.contract import StageContext, StageResult

VERSION = 1


class ImportConfig(Config):
    """Which weights. No part of the key: their hash is."""

    not_in_key: ClassVar[tuple[str, ...]] = ("pretrained",)

    pretrained: str = Field("", description="a timm name with its tag, hf-hub:OWNER/NAME or local-dir:FOLDER")

    def fingerprint(self) -> str:
        """The identity of weights and description. Raises UserError where they are neither here nor to be fetched."""
        found = locate(self.pretrained)
        return digest([found.fingerprint(), found.config])


def import_model(context: StageContext, config: ImportConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Copy the weights and timm's description of the network into the store."""
    spec = {"store": context.store.url, "key": context.key, "pretrained": config.pretrained}
    (made,) = context.engine.map("models.imported:import_model", [spec], lambda progress: None)
    return StageResult(tuple(FileEntry.model_validate(entry) for entry in made["files"]), made["metrics"])
