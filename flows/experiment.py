"""The config of a whole run: a recipe (YAML) with dotted overrides -> a typed, cross-checked `Experiment`.

A recipe may lie upon another file of its kind, `base: FILE` (a path from its own folder): what it says replaces what that
says, section by section. Its `train` part is common to all networks; `teacher`, `student` and `selector` add to it, and
each entry of `iterations` adds to `student`. Iterations count from 1, as in refs: `iterations.2.batch_ratio=28` is
`NAME/2/student`.
"""

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from flows.overrides import apply_override, explain, split_override
from models.compute import ComputeConfig
from models.configs import TrainConfig
from storage.errors import UserError
from storage.external import ExternalFolder
from storage.keys import Config
from tasks.evaluators.section import EvaluateConfig
from tasks.ingest import DataConfig
from tasks.label import LabelConfig
from tasks.selection.config import SelectConfig

RECIPES = Path(__file__).resolve().parent.parent / "deployments" / "recipes"
DEFAULT_STORE = "nst-store"  # a folder where the command runs
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
TRAIN_PARTS = ("teacher", "student", "selector")


class Recipe(Config):
    """The form of a recipe file, before inheritance is resolved. For checking names and types of overrides."""

    name: str = Field(pattern=NAME_PATTERN, description="of the experiment: its runs and refs carry it")
    description: str = ""
    data: DataConfig = DataConfig()
    train: TrainConfig
    teacher: TrainConfig
    student: TrainConfig
    selector: TrainConfig
    iterations: tuple[TrainConfig, ...]
    order: Literal["each_iteration", "once"] = "each_iteration"
    label: LabelConfig = LabelConfig()
    select: SelectConfig = SelectConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compute: ComputeConfig = ComputeConfig()
    scales: dict[str, dict[str, Any]] = {}


class Experiment(Config):
    """A whole run: a teacher, then one student an iteration, each the teacher of the next."""

    name: str = Field(pattern=NAME_PATTERN)
    description: str = ""
    data: DataConfig = DataConfig()
    teacher: TrainConfig
    iterations: tuple[TrainConfig, ...] = Field(min_length=1, max_length=100)
    selector: TrainConfig | None = Field(
        None, description="order=once: the network that scores all images; null: the teacher"
    )
    order: Literal["each_iteration", "once"] = Field(
        "each_iteration",
        description="each_iteration: every teacher labels all images and they are selected anew; once (the paper's): a "
        "selecting model scores all images once, each teacher labels only the selected ones",
    )
    label: LabelConfig = LabelConfig()
    select: SelectConfig = SelectConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _cross_check(self) -> "Experiment":
        for field, config in self.networks().items():
            if config.replicas % self.compute.ranks:
                raise ValueError(
                    f"compute.ranks={self.compute.ranks} does not divide {field}.replicas={config.replicas}; "
                    "set compute.ranks to a divisor of it"
                )
        if self.selector is not None and self.order != "once":
            raise ValueError("selector is set, but only order=once uses one; remove it or set order=once")
        if self.selector is not None and self.selector.finetune is not None:
            raise ValueError("selector.finetune: the selecting model is not fine-tuned; remove it")
        for field, alone in (("teacher", self.teacher), ("selector", self.selector)):
            if alone is not None and alone.frozen_layers and not alone.pretrained:
                raise ValueError(
                    f"{field}.frozen_layers={alone.frozen_layers} would keep random weights; set {field}.pretrained, or "
                    "frozen_layers in student or finetune"
                )
        teacher, place = self.teacher, "teacher"
        for number, student in enumerate(self.iterations, start=1):
            self._check_student(f"iterations.{number}", student, place, teacher)
            teacher, place = student, f"iterations.{number}"
        return self

    def _check_student(self, field: str, student: TrainConfig, place: str, teacher: TrainConfig) -> None:
        """Raise ValueError where a student does not fit the labels it gets or the teacher it starts from."""
        own = [(c.model.name.split(".")[0], c.model.args) for c in (student, teacher)]
        if student.init == "model" and own[0] != own[1]:
            raise ValueError(
                f"{field}.init=model starts from the weights of {place}, which is another network ({own[1][0]}, here "
                f"{own[0][0]}); set the same model.name and model.args, or init=random"
            )
        if student.pseudo_label_source == "online":
            if self.label.num_teachers > 1:
                raise ValueError(
                    f"{field}.pseudo_label_source=online asks the newest teacher alone; set label.num_teachers=1 or "
                    "pseudo_label_source=stored"
                )
        elif self.label.targets == "hard" and student.pseudo_labels == "soft":
            raise ValueError(
                f"label.targets=hard stores one class an image, and {field}.pseudo_labels=soft would not smooth it; set "
                f"{field}.pseudo_labels=hard, or label.targets=soft"
            )

    def networks(self) -> dict[str, TrainConfig]:
        """Every training, by its place in the recipe: teacher, selector, iterations.1, iterations.1.finetune and so on."""
        found = {"teacher": self.teacher}
        if self.selector is not None:
            found["selector"] = self.selector
        found |= {f"iterations.{i}": config for i, config in enumerate(self.iterations, start=1)}
        second = {f"{name}.finetune": config.finetuning() for name, config in found.items() if config.finetune}
        return {**found, **second}


def load_experiment(recipe: str, overrides: Sequence[str] = (), scale: str = "") -> Experiment:
    """Read a recipe (a path, a URL, or the name of a shipped one), apply a scale and overrides, check everything.

    Touches nothing but the recipe file. Raises UserError naming file, field and remedy.
    """
    name, raw = _read_remote(recipe) if "://" in recipe else _read_local(recipe)
    scales = raw.pop("scales", None) or {}
    if scale:
        if scale not in scales:
            raise UserError(f"{name}: no scale {scale!r}; it offers {', '.join(scales) or 'none'}")
        for dotted, value in scales[scale].items():
            apply_override(Recipe, raw, dotted, value, name)
    for text in overrides:
        dotted, value = split_override(text)
        if dotted.partition(".")[0] == "scales":
            raise UserError(
                f"override {text!r}: a scale is part of the recipe; edit it there and choose it with --scale"
            )
        apply_override(Recipe, raw, dotted, value, "override")
    return resolve(raw, name)


def shipped_recipes() -> tuple[str, ...]:
    """The names of the recipes that come with the project."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one. Raises UserError naming those there are."""
    for candidate in (Path(recipe), RECIPES / f"{recipe}.yaml"):
        if candidate.is_file():
            return candidate
    folder, name = Path(recipe).parent.absolute(), Path(recipe).name
    beside = [path.name for path in (*folder.glob("*.yaml"), *folder.glob("*.yml"))]
    near = difflib.get_close_matches(name, [*beside, *shipped_recipes()], n=1)
    hint = f" -> did you mean {near[0]}?" if near else f"; shipped: {', '.join(shipped_recipes())}"
    raise UserError(f"recipe {recipe!r} is no file in {folder} and no shipped recipe{hint}")


def resolve(raw: dict[str, Any], where: str) -> Experiment:
    """Carry out the inheritance of a recipe and check the result. Raises UserError naming the field."""
    for name in ("train", *TRAIN_PARTS):
        if not isinstance(raw.get(name), (dict, type(None))):
            raise UserError(f"{where}: {name} must be a section of fields (found {raw[name]!r})")
    fields = {name: value for name, value in raw.items() if name not in ("train", "iterations", *TRAIN_PARTS)}
    common = raw.get("train") or {}
    iterations = raw.get("iterations", [{}])
    if not isinstance(iterations, list) or not all(isinstance(entry, (dict, type(None))) for entry in iterations):
        raise UserError(
            f"{where}: iterations must be a list with one entry a student, e.g. [{{}}, {{batch_ratio: 28}}]"
        )
    student = merge(common, raw.get("student") or {})
    fields["teacher"] = merge(common, raw.get("teacher") or {})
    fields["iterations"] = [merge(student, entry or {}) for entry in iterations]
    if raw.get("selector") is not None:
        fields["selector"] = merge(common, raw["selector"])
    try:
        return Experiment.model_validate(fields)
    except ValidationError as error:
        raise UserError(explain(error, Recipe, where, lambda steps: _written_at(steps, raw))) from None


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `top` laid over it, section by section."""
    merged = copy.deepcopy(base)
    for name, value in top.items():
        below = merged.get(name)
        merged[name] = (
            merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else copy.deepcopy(value)
        )
    return merged


def _written_at(steps: list[str], raw: dict[str, Any]) -> list[str]:
    """Where a recipe says a network's field: in its own section, in `student`, or else in `train`."""
    if not steps or steps[0] not in ("iterations", *TRAIN_PARTS) or steps == ["iterations"]:
        return steps
    own, rest = (steps[:2], steps[2:]) if steps[0] == "iterations" else (steps[:1], steps[1:])
    sections = [own, ["student"]] if steps[0] == "iterations" else [own]
    return [*next((section for section in sections if _says(raw, [*section, *rest])), ["train"]), *rest]


def _says(value: Any, steps: list[str]) -> bool:
    """Whether a raw recipe has a value at that place."""
    for step in steps:
        if isinstance(value, list):
            value = value[int(step) - 1]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            return False
    return True


def _read_local(recipe: str) -> tuple[str, dict[str, Any]]:
    path = find_recipe(recipe)
    return path.name, _read_yaml(path)


def _read_remote(url: str) -> tuple[str, dict[str, Any]]:
    """A recipe by its URL. It stands alone: what it may lie upon would have to be looked for beside it."""
    folder, _, name = url.rpartition("/")
    place = ExternalFolder(folder, "recipe")
    found = [file for file in place.find(name) if file.name == name]
    if not found:
        raise UserError(f"recipe {url}: there is no such file; give its URL, the path of a file, or a shipped recipe")
    raw = _parse(place.read(found[0]), url)
    if "base" in raw:
        raise UserError(f"recipe {url}: base={raw['base']!r} is read beside files only; write the recipe out in one")
    return name, raw


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        raw = _parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if "base" in raw:
        raw = merge(_read_base(path, raw.pop("base"), (*above, path.resolve())), raw)
    return raw


def _parse(data: bytes, where: str) -> dict[str, Any]:
    """A recipe's YAML, its form checked as far as the scales. Raises UserError."""
    try:
        raw = yaml.safe_load(data.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{where} is empty or no mapping; a recipe needs at least name, data, train, iterations")
    scales = raw.get("scales") or {}
    if not isinstance(scales, dict) or not all(isinstance(fields, dict) for fields in scales.values()):
        name = where.rpartition("/")[2]
        raise UserError(f"{name}: scales must map a name to dotted fields, e.g. {{smoke: {{teacher.epochs: 1}}}}")
    return raw


def _read_base(path: Path, base: Any, above: tuple[Path, ...]) -> dict[str, Any]:
    """The file that a recipe lies upon. Raises UserError where there is none, or one that leads back to itself."""
    below = path.parent / str(base)
    if not isinstance(base, str) or not below.is_file():
        raise UserError(f"{path.name}: base={base!r} is no file in {path.parent}; name one by its path from there")
    if below.resolve() in above:
        raise UserError(f"{path.name}: base={base!r} lies upon this file itself; remove one of the two")
    return _read_yaml(below, above)
