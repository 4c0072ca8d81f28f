"""The `evaluate` section of a recipe: which evaluators run on every model, and how."""

from pydantic import Field

from storage.keys import Config
from tasks.evaluators.attacked import FgsmConfig, PgdConfig
from tasks.evaluators.clean import CleanConfig
from tasks.evaluators.contract import EvaluatorConfig
from tasks.evaluators.corrupted import CorruptedConfig
from tasks.evaluators.imagenet_c import ImageNetCConfig
from tasks.evaluators.imagenet_p import ImageNetPConfig
from tasks.evaluators.perturbed import PerturbedConfig
from tasks.evaluators.subset import SubsetConfig


class EvaluateConfig(Config):
    """The clean evaluation always runs; each other one where its section stands (`evaluate: {corrupted: {}}`)."""

    clean: CleanConfig = CleanConfig()
    corrupted: CorruptedConfig | None = Field(None, description="ImageNet-C's corruptions, made on the fly")
    perturbed: PerturbedConfig | None = Field(None, description="ImageNet-P's sequences, made on the fly")
    fgsm: FgsmConfig | None = Field(None, description="one signed gradient step, a sweep of sizes")
    pgd: PgdConfig | None = Field(None, description="ten signed gradient steps")
    subset: SubsetConfig | None = Field(None, description="ImageNet-A and the like: class folders of some classes")
    imagenet_c: ImageNetCConfig | None = Field(None, description="the published corrupted images")
    imagenet_p: ImageNetPConfig | None = Field(None, description="the published sequences")

    def asked(self) -> dict[str, EvaluatorConfig]:
        """The settings of the evaluators that run, by their short names."""
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: config for name, config in settings.items() if config is not None}
