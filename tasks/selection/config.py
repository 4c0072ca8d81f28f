"""The settings of a selection, checked against each other."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from storage.keys import Config


class SelectConfig(Config):
    """Which pseudo-labeled images a student learns from, and how many copies of each."""

    method: Literal["exact", "reference"] = Field(
        "exact",
        description="exact: the most confident images of a class, up to the cap; reference (the authors' code): a threshold "
        "for each class on a grid of 0.01, every image above it at random with the expected number of copies",
    )
    min_confidence: float = Field(0.3, ge=0, le=1, description="least confidence of a kept image (paper: 0.3)")
    max_confidence: float | None = Field(
        None,
        gt=0,
        le=1,
        description="kept images are less confident than this (study 3's intervals); null or 1: no bound, so the highest "
        "interval has the images of confidence 1 too",
    )
    balance: bool = Field(
        True, description="false: every image that passes the filter, once (table 12): no cap, no copies"
    )
    images_per_class: int = Field(
        130_000, ge=1, le=1 << 24, description="cap of a class, and the target of duplication"
    )
    subset: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the balanced set, drawn by image (study 2's 1/128 ... 1); a smaller one lies within a larger",
    )
    on_empty_class: Literal["error", "skip", "best"] = Field(
        "error",
        description="what a class does of which no image passes the filter: end the run, stay empty, or take its most "
        "confident images below the threshold, up to the cap (a class of which there is no image at all stays empty)",
    )
    shard_images: int = Field(10_000, ge=1, description="images of an output shard, at most")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of all chance: duplicates, draws, subset, order of the images")

    @field_validator("max_confidence")
    @classmethod
    def _one_bounds_nothing(cls, value: float | None) -> float | None:
        return None if value == 1 else value

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.max_confidence is not None and self.max_confidence <= self.min_confidence:
            raise ValueError(
                f"max_confidence={self.max_confidence} must be above min_confidence={self.min_confidence}; raise it, or leave "
                "it out for no bound"
            )
        if not self.balance and self.method == "reference":
            raise ValueError("method=reference balances the classes; set balance=true, or method=exact")
        if self.on_empty_class == "best" and (not self.balance or self.method == "reference"):
            raise ValueError(
                "on_empty_class=best takes the most confident images up to images_per_class, which needs balance=true and "
                "method=exact; set it to skip or error"
            )
        return self
