"""The settings of a network and its training, as types. Without torch: `nst plan` reads these.

Defaults are the paper's (section 4.1, `EfficientNet`) where it states them.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from storage.keys import Config

PAPER_OPS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
RELEASED_OPS = (*PAPER_OPS, "SolarizeAdd", "Cutout")  # what the authors' code has beyond the paper's list
SMALL_IMAGE_NETWORKS = ("efficientnet_b0_svhn", "wide_resnet28_2")  # models/variants.py: timm alone does not build them


class NoiseConfig(Config):
    """Input noise: a random crop and flip, then RandAugment, then at will a fixed cutout."""

    crop: Literal["none", "pad", "resized"] = Field(
        "resized", description="none: center; pad: reflect-pad and random crop; resized: random area and aspect"
    )
    pad_px: int = Field(4, ge=0, description="padding of crop=pad, in pixels a side")
    min_area: float = Field(0.08, gt=0, le=1, description="least area of crop=resized, as a share of the image")
    flip: bool = Field(True, description="mirror left-right with probability 0.5")
    num_ops: int = Field(2, ge=0, le=16, description="RandAugment operations an image, N; 0 switches it off")
    magnitude: float = Field(9.0, ge=0, le=30, description="RandAugment magnitude, M; may go past 10 (B7: 27)")
    ops: tuple[str, ...] = Field(PAPER_OPS, min_length=1, description="the operations to draw from")
    translate_px: float = Field(100.0, ge=0, description="pixels that TranslateX/Y move at magnitude 10")
    cutout_px: float = Field(40.0, ge=0, description="half-side in pixels of the Cutout operation at magnitude 10")
    patch_px: int = Field(0, ge=0, description="half-side in pixels of one fixed cutout at the end; 0: none")

    @model_validator(mode="after")
    def _known_ops(self) -> "NoiseConfig":
        unknown = sorted(set(self.ops) - set(RELEASED_OPS))
        if unknown:
            raise ValueError(f"unknown operations {', '.join(unknown)}; choose from {', '.join(RELEASED_OPS)}")
        return self


class ModelConfig(Config):
    """A timm network, its arguments and its input."""

    name: str = Field(min_length=1, description="timm's name of the network")
    args: dict[str, Any] = Field({}, description="further arguments of timm.create_model")
    image_size: int = Field(224, ge=8, le=4096, description="height and width of the input, in pixels")
    crop_pct: float = Field(
        1.0, gt=0, le=1, description="share of the shorter side that the clean view's center crop keeps"
    )
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="of the RGB channels in [0, 1]")
    std: tuple[float, float, float] = Field((0.229, 0.224, 0.225), description="of the RGB channels in [0, 1]")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the classifier")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth: drop rate of the last block, linear from 0"
    )


class OptimizerConfig(Config):
    """RMSProp in TensorFlow's form by default, as in the paper; any of timm's optimizers by name."""

    name: str = "rmsproptf"
    lr_per_256: float = Field(0.016, gt=0, description="peak learning rate per 256 labeled images of the global batch")
    momentum: float = Field(0.9, ge=0, lt=1)
    decay: float = Field(0.9, gt=0, lt=1, description="RMSProp's decay of the squared gradient")
    eps: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-5, ge=0, description="not applied to biases and batch norm")


class ScheduleConfig(Config):
    """Learning rate by labeled epoch: linear warm-up, then steps of x0.97 (the paper) or a cosine to zero."""

    kind: Literal["exponential", "cosine"] = "exponential"
    warmup_epochs: float = Field(5.0, ge=0)
    decay_factor: float = Field(0.97, gt=0, le=1)
    decay_epochs: float = Field(2.4, gt=0, description="epochs between two steps of the exponential decay")


class ViewConfig(Config):
    """One view of an image that a teacher labels: the clean view, at will mirrored or cut closer or wider."""

    flip: bool = Field(False, description="mirror left-right")
    crop_pct: float | None = Field(
        None, gt=0, le=1, description="share of the shorter side that the center crop keeps; null: the model's own"
    )


class LabelConfig(Config):
    """What is stored of a teacher's predictions.

    Class and confidence, by which images are selected, are always those of the un-noised model at temperature 1; the
    fields here say which probabilities a student learns from.
    """

    not_in_key: ClassVar[tuple[str, ...]] = ("num_teachers",)  # the teachers themselves are inputs

    num_teachers: int = Field(
        1,
        ge=1,
        description="so many of the newest models label together: the mean of their probabilities (where there are)",
    )
    targets: Literal["soft", "hard"] = Field("soft", description="hard: all of the probability at the likeliest class")
    temperature: float = Field(1.0, gt=0, description="of the stored probabilities: softmax(logits / temperature)")
    top_k: int = Field(0, ge=0, description="store the k likeliest classes only; what is missing is spread evenly")
    views: tuple[ViewConfig, ...] = Field(
        (ViewConfig(),), min_length=1, description="views whose probabilities are averaged (data distillation)"
    )
    noised: bool = Field(
        False,
        description="the teacher keeps the noise of its training (the paper's ablation): input, dropout, drop path",
    )
    seed: int = Field(0, ge=0, description="of the noise of noised=true")

    @model_validator(mode="after")
    def _fit(self) -> "LabelConfig":
        if self.targets == "hard" and (self.top_k or self.temperature != 1.0):
            raise ValueError("hard targets are one class: remove top_k and temperature, or set targets=soft")
        if self.noised and len(self.views) > 1:
            raise ValueError("a noised teacher sees one noised view: remove views, or set noised=false")
        if self.seed and not self.noised:
            raise ValueError(f"seed={self.seed} seeds the noise of noised=true alone; remove it")
        if len(set(self.views)) < len(self.views):
            raise ValueError("a view stands twice in views; remove one")
        return self


STUDENT_ONLY = (
    "train_on", "batch_ratio", "unlabeled_noise", "unlabeled_dropout", "unlabeled_drop_path", "pseudo_labels",
    "pseudo_label_source", "temperature", "loss", "init", "allow_smaller",
)  # fmt: skip
NO_NOISE = NoiseConfig(crop="none", flip=False, num_ops=0)


class FinetuneConfig(Config):
    """A second training on the labeled images alone, from the weights of the first: at a higher resolution with the
    shallow layers fixed (section 3.1, after FixRes), or of a student that saw pseudo labels alone (study 6).

    What stands here replaces the network's own setting; the paper states epochs, resolution and no augmentation only.
    """

    epochs: float = Field(1.5, gt=0, description="passes over the labeled set (L2: 1.5)")
    image_size: int = Field(0, ge=0, le=4096, description="in pixels; 0: as in training")
    crop_pct: float = Field(0.0, ge=0, le=1, description="of the clean view; 0: as in training")
    labeled_batch: int = Field(0, ge=0, description="labeled images of a global batch; 0: as in training")
    frozen_layers: float = Field(0.0, ge=0, lt=1, description="share of the layers, from the input on, that stay fixed")
    noise: NoiseConfig = NO_NOISE
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the classifier")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth, as in the network's own setting")
    optimizer: OptimizerConfig = OptimizerConfig(lr_per_256=0.001)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", warmup_epochs=0.0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    num_validations: int = Field(2, ge=1)


class TrainConfig(Config):
    """One network's training, teacher or student. A teacher has no unlabeled part, so it ignores those fields."""

    not_in_key: ClassVar[tuple[str, ...]] = ("allow_smaller",)

    model: ModelConfig
    pretrained: str = Field(
        "",
        description="start from these weights: a timm name with its tag, hf-hub:OWNER/NAME or local-dir:FOLDER; with "
        "epochs=0 the network is taken as it is instead of training one",
    )
    init: Literal["random", "model"] = Field(
        "random", description="model: start from the weights of the teacher (study 8); a fine-tuning always does so"
    )
    frozen_layers: float = Field(0.0, ge=0, lt=1, description="share of the layers, from the input on, that stay fixed")
    train_on: Literal["both", "unlabeled"] = Field(
        "both", description="unlabeled: pseudo labels alone (study 6 pretrains like that, then fine-tunes)"
    )
    finetune: FinetuneConfig | None = Field(None, description="a second training on labeled images from these weights")
    epochs: float = Field(350.0, ge=0, description="passes over the labeled set; 0: pretrained weights as they are")
    labeled_batch: int = Field(2048, ge=1, description="labeled images of a global batch")
    batch_ratio: float = Field(3.0, gt=0, description="unlabeled : labeled images of a batch")
    replicas: int = Field(
        1, ge=1, description="micro-batches of a global batch, each with its own batch-norm statistics"
    )
    batch_norm: Literal["replica", "synchronized"] = Field(
        "replica", description="statistics of each replica, or of all of them together (GPUs only, one replica a rank)"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_norm: float = Field(0.0, ge=0, description="largest norm of a step's gradient; 0: not clipped")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="of the weight average that predicts and is evaluated")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="on labels and hard pseudo labels; none on soft ones")
    bn_momentum: float = Field(0.01, gt=0, le=1, description="torch's form: the share of the new batch")
    noise: NoiseConfig = NoiseConfig()
    unlabeled_noise: NoiseConfig | None = Field(None, description="null: the same noise as for labeled images")
    unlabeled_dropout: bool = Field(True, description="dropout on unlabeled images too (table 6)")
    unlabeled_drop_path: bool = Field(True, description="stochastic depth on unlabeled images too (table 6)")
    pseudo_labels: Literal["soft", "hard"] = "soft"
    pseudo_label_source: Literal["stored", "online"] = Field(
        "stored", description="online: the newest teacher predicts the clean view of each unlabeled image in the step"
    )
    temperature: float = Field(1.0, gt=0, description="soft labels are re-tempered as p^(1/T), renormalized")
    loss: Literal["concatenated", "sum_of_means", "ratio_weighted"] = Field(
        "concatenated", description="section 3.1; Algorithm 1; the released code"
    )
    shuffle_shards: int = Field(16, ge=1, description="shards among whose samples the order is shuffled")
    num_validations: int = Field(10, ge=1, description="how often the average is measured on the validation set")
    keep: Literal["last", "best"] = Field(
        "last", description="best: publish the average of the validation that was best, the earliest of equals"
    )
    record_steps: int = Field(
        0, ge=0, description="steps between two rows of the history; 0: about 100 rows a training"
    )
    seed: int = Field(0, ge=0)
    allow_smaller: bool = Field(False, description="let this student have fewer parameters than its teacher")

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainConfig":
        for batch in {self.labeled_batch, self.finetune.labeled_batch if self.finetune else 0}:
            if batch % self.replicas:
                raise ValueError(f"labeled_batch={batch} does not divide into replicas={self.replicas} equal parts")
        return self

    @model_validator(mode="after")
    def _fit(self) -> "TrainConfig":
        if self.epochs == 0 and not self.pretrained:
            raise ValueError("epochs=0 trains nothing: set epochs, or pretrained to take its weights as they are")
        if self.pretrained and self.init == "model":
            raise ValueError("pretrained and init=model both say where the weights come from; remove one")
        if self.frozen_layers and not self.pretrained and self.init == "random":
            raise ValueError(f"frozen_layers={self.frozen_layers} would keep random weights; set init or pretrained")
        return self

    def as_teacher(self) -> "TrainConfig":
        """Without what only a student uses, so that changing it does not change a teacher's key."""
        return TrainConfig.model_validate({k: v for k, v in self.model_dump().items() if k not in STUDENT_ONLY})

    def without_finetune(self) -> "TrainConfig":
        """The first training alone."""
        return self.model_copy(update={"finetune": None})

    def finetuning(self) -> "TrainConfig":
        """The second training. Raises ValueError where there is none."""
        if self.finetune is None:
            raise ValueError("this network has no fine-tuning")
        own = self.finetune.model_dump(exclude={"image_size", "crop_pct", "labeled_batch", "dropout", "drop_path"})
        first = self.as_teacher().model_dump(exclude={"finetune", "pretrained"})
        model = {**first["model"], "dropout": self.finetune.dropout, "drop_path": self.finetune.drop_path}
        for name in ("image_size", "crop_pct"):
            model[name] = getattr(self.finetune, name) or model[name]
        batch = self.finetune.labeled_batch or self.labeled_batch
        return TrainConfig.model_validate({**first, **own, "model": model, "labeled_batch": batch, "init": "model"})

    @property
    def replica_labeled(self) -> int:
        """Labeled images of one replica's micro-batch."""
        return self.labeled_batch // self.replicas

    @property
    def replica_unlabeled(self) -> int:
        """Unlabeled images of one replica's micro-batch, at least one."""
        return max(1, round(self.replica_labeled * self.batch_ratio))
