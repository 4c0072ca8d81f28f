"""A study: one table or figure of the paper as a grid of runs, read from `deployments/studies/*.yaml` and checked.

A row of the paper's table is a *variant*: settings laid over the study's common ones, the network of the run that is
measured, and the paper's number. Rows that are other networks of the same run name it with `of`. A study has the same
question at several *scales*: `imagenet` has the paper's own settings, `cifar10` is small enough for one machine. Every
variant is run with every seed, as an experiment `study-NAME-VARIANT-seedN`; what runs have in common they share by key.

Settings are laid over each other in this order: the recipe, its scale, the study's `overrides`, those of the command line,
the variant's, the seed. So no override of the command line takes away what tells two variants apart.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from flows.experiment import NAME_PATTERN, Experiment, load_experiment
from flows.graph import Node, build_graph, evaluations_of, made_from
from flows.overrides import explain, split_override
from storage.errors import UserError
from storage.keys import Config
from tasks.evaluators import BY_SHORT

STUDIES = Path(__file__).resolve().parent.parent / "deployments" / "studies"
DEFAULT_SCALE = "cifar10"
NETWORK_PATTERN = r"^\d+/(teacher|student|finetune)$"

Direction = Literal["higher", "lower", "same"]


class Metric(Config):
    """What is compared: a field of the records of `tasks/results.py`, by its dotted name."""

    field: str = Field(
        "top1", min_length=1, description="e.g. top1, or a number of an evaluator's metrics: evaluations.imagenet_c.mce"
    )
    title: str = "test top-1, %"
    factor: float = Field(100.0, gt=0, description="from the record's unit to the paper's")
    digits: int = Field(2, ge=0, le=6, description="decimals that are printed")

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.evaluator and self.evaluator not in BY_SHORT:
            raise ValueError(
                f"field={self.field}: there is no evaluator {self.evaluator}; there are {', '.join(BY_SHORT)}"
            )
        return self

    @property
    def evaluator(self) -> str:
        """The short name of the evaluator whose number it is; empty: a field of every result."""
        section, _, rest = self.field.partition(".")
        return rest.partition(".")[0] if section == "evaluations" else ""


class Images(Config):
    """How many images the paper's data has: for the cost, before any data is there."""

    labeled: int = Field(ge=1)
    unlabeled: int = Field(ge=1, description="that are scored once, or by every teacher with order=each_iteration")
    selected: int = Field(ge=1, description="distinct images that a selection keeps: labeled anew with order=once")


class Variant(Config):
    """One row of the table."""

    name: str = Field(pattern=NAME_PATTERN)
    title: str = Field("", description="how the row is called in the table; empty: the name")
    of: str = Field("", description="the variant whose runs this row reads; it then has no settings of its own")
    recipe: str = Field("", description="instead of the scale's")
    overrides: dict[str, Any] = Field({}, description="dotted settings: what the row is about")
    network: str = Field("1/student", pattern=NETWORK_PATTERN, description="the network of the run that is measured")
    paper: float | None = Field(None, description="the paper's number, in the metric's unit; null: it prints none")
    metric: Metric | None = Field(None, description="instead of the study's")
    against: str = Field(
        "",
        description="the variant that this row is compared with; empty: the scale's reference, if it has the same metric",
    )
    direction: Direction | None = Field(
        None, description="what the paper says of the row beside `against` where it prints no numbers (a figure)"
    )
    images: Images | None = Field(None, description="instead of the scale's")

    @property
    def label(self) -> str:
        """How people call the row."""
        return self.title or self.name


class StudyScale(Config):
    """The study at one scale: a recipe, the common settings, the variants."""

    about: str = Field(min_length=1, description="what runs, and what differs from the paper")
    recipe: str
    recipe_scale: str = Field("", description="a scale that the recipe offers")
    overrides: dict[str, Any] = Field({}, description="dotted settings of all variants")
    seeded: tuple[str, ...] = Field(
        ("train.seed", "select.seed"), min_length=1, description="dotted settings that get the seed's number"
    )
    seeds: int = Field(3, ge=1, le=100, description="0, 1, ... up to so many, unless --seeds says otherwise")
    reference: str = Field(description="the variant that rows are compared with")
    variants: tuple[Variant, ...] = Field(min_length=2)
    images: Images | None = Field(None, description="the paper's data, where the cost is to be estimated")

    @model_validator(mode="after")
    def _cross_check(self) -> Self:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"variant {twice[0]} stands twice; rename one of the two")
        by_name = dict(zip(names, self.variants, strict=True))
        if self.reference not in by_name:
            raise ValueError(f"reference={self.reference} is no variant; it has {', '.join(names)}")
        reserved = {"name", *self.seeded}
        for where, overrides in (("overrides", self.overrides), *((v.name, v.overrides) for v in self.variants)):
            if reserved & set(overrides):
                raise ValueError(f"{where} sets {min(reserved & set(overrides))}, which the study sets; remove it")
        for variant in self.variants:
            self._check_variant(variant, by_name)
        return self

    def _check_variant(self, variant: Variant, by_name: dict[str, Variant]) -> None:
        """Raise ValueError where a variant names others wrongly."""
        for field in ("of", "against"):
            other = getattr(variant, field)
            if other and (other not in by_name or other == variant.name):
                raise ValueError(f"variant {variant.name}: {field}={other} is no other variant; name one of this scale")
        if variant.against and by_name[variant.against].metric != variant.metric:
            raise ValueError(
                f"variant {variant.name}: against={variant.against} has another metric; compare rows of the same one"
            )
        if variant.of and (by_name[variant.of].of or variant.overrides or variant.recipe):
            raise ValueError(
                f"variant {variant.name}: of={variant.of} reads the runs of a variant that has its own; it has no recipe "
                "and no overrides, and the other no `of`"
            )
        compared = self.compared_with(variant)
        numbers = [row.paper for row in (variant, compared) if row is not None]
        if variant.direction is not None and (compared is None or None not in numbers):
            raise ValueError(
                f"variant {variant.name}: direction={variant.direction} is for rows of which the paper prints no numbers; "
                "remove it, or the number"
            )

    def compared_with(self, variant: Variant) -> Variant | None:
        """The row that a row is compared with; None for the reference, and where that has another metric."""
        name = variant.against or self.reference
        other = next(v for v in self.variants if v.name == name)
        return None if name == variant.name or other.metric != variant.metric else other

    def owner(self, variant: Variant) -> Variant:
        """The variant whose runs a row reads: mostly itself."""
        return next(v for v in self.variants if v.name == variant.of) if variant.of else variant


class Study(Config):
    """A question of the paper's, at its scales."""

    name: str = Field(pattern=NAME_PATTERN)
    title: str
    paper: str = Field(min_length=1, description="the table or figure")
    finding: str = Field(min_length=1, description="what the paper found, in our words")
    metric: Metric = Metric()
    scales: dict[str, StudyScale] = Field(min_length=1)

    def metric_of(self, variant: Variant) -> Metric:
        """What is compared in a row."""
        return variant.metric or self.metric

    def at(self, scale: str) -> StudyScale:
        """The study at a scale. Raises UserError naming those there are."""
        if scale not in self.scales:
            raise UserError(f"study {self.name} has no scale {scale!r}; it offers {', '.join(self.scales)}")
        return self.scales[scale]


@dataclass(frozen=True)
class GridRun:
    """A variant with a seed: an experiment, and of its stages those that the study's rows need."""

    variant: str
    seed: int
    recipe: str
    experiment: Experiment
    graph: tuple[Node, ...]
    needed: tuple[Node, ...]
    targets: tuple[str, ...]  # the evaluations


@dataclass(frozen=True)
class Grid:
    """A study at a scale, resolved and checked: all its runs, seed by seed."""

    study: Study
    scale_name: str
    seeds: int
    overrides: tuple[str, ...]
    runs: tuple[GridRun, ...]

    @property
    def scale(self) -> StudyScale:
        """The study at the grid's scale."""
        return self.study.at(self.scale_name)


def shipped_studies() -> list[Path]:
    """The files of the studies that come with the project."""
    return sorted(STUDIES.glob("*.yaml"))


def load_study(name: str) -> Study:
    """The study of that name, or of a YAML file. Raises UserError naming file, field and remedy."""
    places = (Path(name), STUDIES / f"{name}.yaml")
    path = next((place for place in places if place.suffix == ".yaml" and place.is_file()), None)
    if path is None:
        known = ", ".join(place.stem for place in shipped_studies())
        raise UserError(f"study {name!r} is no file and no shipped study; shipped: {known}")
    try:
        raw = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is no mapping; a study needs name, title, paper, finding and scales")
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, Study, path.name)) from None
    if study.name != path.stem:
        raise UserError(f"{path.name}: name={study.name} is not the file's name; call both alike")
    return study


def make_grid(study: Study, scale_name: str, seeds: int = 0, overrides: Sequence[str] = ()) -> Grid:
    """Resolve and check every run of a study, before anything is touched; `seeds`: 0 means the scale's own number.

    Raises UserError naming study, variant, field and remedy.
    """
    scale = study.at(scale_name)
    for text in overrides:
        dotted, _ = split_override(text)
        if dotted in ("name", *scale.seeded):
            raise UserError(
                f"override {text!r}: study {study.name} sets {dotted} itself, a run a variant and seed; remove it"
            )
    rows: dict[str, list[Variant]] = {}
    for variant in scale.variants:
        rows.setdefault(scale.owner(variant).name, []).append(variant)
    own = [variant for variant in scale.variants if not variant.of]
    num_seeds = seeds or scale.seeds
    runs = (
        _grid_run(study, scale, variant, seed, overrides, rows[variant.name])
        for seed in range(num_seeds)
        for variant in own
    )
    return Grid(study, scale_name, num_seeds, tuple(overrides), tuple(runs))


def _grid_run(
    study: Study, scale: StudyScale, variant: Variant, seed: int, overrides: Sequence[str], rows: list[Variant]
) -> GridRun:
    """One run, with the stages that its rows need."""
    recipe = variant.recipe or scale.recipe
    seeded = dict.fromkeys(scale.seeded, seed)
    name = f"study-{study.name}-{variant.name}-seed{seed}"
    settings = [
        *_texts(scale.overrides),
        *overrides,
        *_texts(variant.overrides),
        *_texts({**seeded, "name": name, "description": f"study {study.name}, {variant.label}, seed {seed}"}),
    ]
    try:
        experiment = load_experiment(recipe, settings, scale.recipe_scale)
    except UserError as error:
        raise UserError(
            f"study {study.name}, variant {variant.name}: {error} (recipe {recipe}; variants are in the study's file)"
        ) from error
    graph = build_graph(experiment)
    targets: list[str] = []
    for row in rows:
        targets += [target for target in _targets(study, row, graph) if target not in targets]
    needed = tuple(made_from(graph, targets))
    return GridRun(variant.name, seed, recipe, experiment, tuple(graph), needed, tuple(targets))


def _targets(study: Study, row: Variant, graph: list[Node]) -> list[str]:
    """The evaluations of a row's network: all, or the one whose number is the row's metric. Raises UserError where there is none."""
    measured = evaluations_of(graph, row.network)
    if not measured:
        known = ", ".join(node.inputs["model"] for node in graph if node.stage == "evaluate")
        raise UserError(
            f"study {study.name}, variant {row.name}: network={row.network} is not measured in these runs; set it to "
            f"one of {known}"
        )
    short = study.metric_of(row).evaluator
    if not short:
        return measured
    wanted = [name for name in measured if name.rpartition("/")[2] == BY_SHORT[short].name]
    if not wanted:
        raise UserError(
            f"study {study.name}, variant {row.name}: metric.field={study.metric_of(row).field} is measured by {short}, which "
            f"its runs do not ask for; add evaluate.{short}: {{}} to the overrides"
        )
    return wanted


def _texts(overrides: dict[str, Any]) -> Iterator[str]:
    """Overrides as the command line writes them."""
    return (f"{dotted}={json.dumps(value)}" for dotted, value in overrides.items())
