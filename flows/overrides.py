"""Dotted overrides (`student.epochs=30`), typed and checked against the config, with a suggestion on a typo."""

import difflib
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from storage.errors import UserError


def split_override(text: str) -> tuple[str, Any]:
    """`a.b=c` -> ("a.b", value), the value read as YAML. Raises UserError on another form."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip():
        raise UserError(f"override {text!r} has no '='; write it as field.name=value, e.g. student.epochs=30")
    try:
        return dotted.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is no YAML ({' '.join(str(error).split())})") from None


def apply_override(root: type[BaseModel], raw: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set a field of a raw recipe in place, after checking its name and the value's type.

    Raises UserError with the nearest name on a typo.
    """
    annotation: Any = root
    place: Any = raw
    steps = dotted.split(".")
    for depth, step in enumerate(steps):
        so_far, last = ".".join(steps[: depth + 1]), depth == len(steps) - 1
        annotation, step_key = _descend(annotation, place, step, so_far, where, root)
        if not isinstance(place, list if isinstance(step_key, int) else dict):
            raise UserError(
                f"{where}: {so_far.rpartition('.')[0]} is no section in the recipe, it has no field {step!r}"
            )
        if last:
            place[step_key] = _check_value(annotation, value, dotted, where)
            return
        below = place[step_key] if isinstance(place, list) else place.get(step_key)
        if below is None:
            below = place[step_key] = [{}] if _item_of(annotation) is not None else {}
        place = below


def explain(
    error: ValidationError,
    root: type[BaseModel],
    where: str,
    written_at: Callable[[list[str]], list[str]] = lambda steps: steps,
) -> str:
    """A validation error as one line an error: file, field, what was wrong, what was found, the nearest name.

    `written_at` maps the place of a resolved field to the place where the recipe says it.
    """
    lines = []
    deeper = {item["loc"][0] for item in error.errors() if len(item["loc"]) > 1}
    for item in error.errors():
        if item["type"] == "too_short" and item["loc"][0] in deeper:
            continue  # pydantic counts the valid items only
        steps = written_at(_steps(item["loc"]))
        dotted = ".".join(steps)
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown field {dotted}{_suggest(dotted, root)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: {dotted} is missing; add it to the recipe or set {dotted}=VALUE")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:] if not message.startswith("List") else message
            found = item["input"] if not isinstance(item["input"], (dict, BaseModel)) else None
            named = f"{dotted}: " if dotted else ""
            lines.append(f"{where}: {named}{message}" + (f" (found {found!r})" if found is not None else ""))
    return "\n".join(dict.fromkeys(lines))


def field_names(annotation: Any, prefix: str = "") -> list[str]:
    """Every dotted field name below a model, sections included."""
    names = []
    model = _model_of(annotation)
    for name, field in (model.model_fields if model else {}).items():
        dotted = f"{prefix}{name}"
        names.append(dotted)
        inner = _item_of(field.annotation)
        names += (
            field_names(inner, f"{dotted}.1.") if inner is not None else field_names(field.annotation, f"{dotted}.")
        )
    return names


def _descend(annotation: Any, place: Any, step: str, so_far: str, where: str, root: type[BaseModel]) -> tuple[Any, Any]:
    """The annotation of a step, and its key in the raw value at `place`."""
    item = _item_of(annotation)
    if isinstance(place, list) and item is not None:
        if not step.isdecimal() or not 1 <= int(step) <= len(place):
            raise UserError(f"{where}: {so_far}: iterations are counted from 1, the last one here is {len(place)}")
        return item, int(step) - 1
    model = _model_of(annotation)
    if model is None:
        if _is_mapping(annotation):
            return Any, step
        raise UserError(f"{where}: {so_far.rpartition('.')[0]} is a single value, it has no field {step!r}")
    if step not in model.model_fields:
        raise UserError(f"{where}: unknown field {so_far}{_suggest(so_far, root)}")
    return model.model_fields[step].annotation, step


def _check_value(annotation: Any, value: Any, dotted: str, where: str) -> Any:
    """A leaf's value, checked; a section is checked when the whole recipe is."""
    if _model_of(annotation) is not None and isinstance(value, dict):
        return value
    if _item_of(annotation) is not None and _model_of(_item_of(annotation)) is not None:
        return value
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {dotted}={value}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    return value


def _suggest(dotted: str, root: type[BaseModel]) -> str:
    """The field that was meant, or the fields that are there."""
    numbers = re.findall(r"\.(\d+)\.", dotted)
    known = [re.sub(r"\.1\.", f".{numbers[0]}.", name) if numbers else name for name in field_names(root)]
    parent, _, leaf = dotted.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    near = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.5)]
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]  # right name, wrong section
    near += sorted(elsewhere, key=lambda name: name.count("."))  # the least deep section was meant most likely
    if near:
        return f" -> did you mean {near[0]}?"
    return f"; fields there: {', '.join(siblings)}" if siblings else ""


def _steps(location: tuple[int | str, ...]) -> list[str]:
    """pydantic's location as people count: list places from 1."""
    return [str(step + 1) if isinstance(step, int) else step for step in location]


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType):
        return next((m for m in map(_model_of, typing.get_args(annotation)) if m is not None), None)
    return None


def _item_of(annotation: Any) -> Any:
    """The item type of `tuple[X, ...]` where X is a model, else None."""
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        return item if _model_of(item) is not None else None
    return None


def _is_mapping(annotation: Any) -> bool:
    return annotation is Any or typing.get_origin(annotation) is dict
