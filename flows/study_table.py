"""A study's table: the paper's number beside ours, and whether the paper's direction reproduces. Pure: numbers in, rows out.

Ours is the mean over the seeds with its standard error. Two rows are compared seed by seed, so that what a seed has of
luck falls out: the difference is the mean of the differences, its standard error is theirs. A direction is judged only
where the difference is clear of chance: further from zero than `T_975` standard errors (Student's t, 95 %, two-sided; with three
seeds 4.30 of them). Closer than that it is "within error", whatever its sign, and also where the paper's numbers are equal:
few seeds show that two settings differ, never that they do not.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flows.studies import Direction, Grid, Metric, Study, Variant
from storage.artifacts import Manifest
from storage.errors import UserError

# 97.5 % quantiles of Student's t by degrees of freedom; any table of it
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T_975_MORE = 2.131  # for more of them than the table has: a little too wide
EQUAL = 1e-9  # two of the paper's numbers that differ by less are the same number

Verdict = Literal["yes", "no", "within error", "one seed", "not measured", ""]


@dataclass(frozen=True)
class Failure:
    """A run that failed, with the first cause."""

    variant: str
    seed: int
    cause: str


@dataclass(frozen=True)
class Measurements:
    """What the store has of a study's runs: the records of `tasks/results.py` by (variant, seed), what is amiss, and the
    artifacts that they are of."""

    records: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]
    notes: Mapping[tuple[str, int], str] = field(default_factory=dict)
    artifacts: Mapping[tuple[str, int], Sequence[Manifest]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of the table. Numbers are in the unit that `measure` names; None where there is none (yet)."""

    name: str
    label: str
    measure: str
    digits: int
    network: str
    against: str
    paper: float | None
    paper_difference: float | None
    paper_direction: Direction | None
    values: tuple[float | None, ...]
    mean: float | None
    error: float | None
    difference: float | None
    difference_error: float | None
    verdict: Verdict
    keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return asdict(self)


def make_rows(grid: Grid, measured: Measurements) -> list[Row]:
    """One row a variant, in the order of the study. Raises UserError where records lack a row's metric altogether."""
    study, variants = grid.study, grid.scale.variants
    found = {v.name: _records(grid, v, measured) for v in variants}
    values = {}
    for variant in variants:
        metric, records = study.metric_of(variant), found[variant.name]
        _check_field(study, metric, [record for record in records if record is not None])
        values[variant.name] = tuple(None if record is None else lookup(record, metric) for record in records)
    return [_row(grid, variant, values, found[variant.name], _notes(grid, variant, measured)) for variant in variants]


def lookup(record: Mapping[str, Any], metric: Metric) -> float | None:
    """A record's value of the metric, in its printed unit; None where it has none."""
    value = _field(record, metric.field.split("."))
    return None if value is None else metric.factor * float(value)


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard error; None for the error of a single value, and for both of none."""
    if not values:
        return None, None
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def direction_of(difference: float) -> Direction:
    """Of a difference between two numbers as the paper prints them."""
    return "same" if abs(difference) < EQUAL else "higher" if difference > 0 else "lower"


def judge(expected: Direction | None, differences: Sequence[float]) -> Verdict:
    """Whether differences of ours, one a seed, bear out the paper's direction."""
    if expected is None:
        return ""
    mean, error = mean_and_error(differences)
    if mean is None:
        return "not measured"
    if error is None:
        return "one seed"
    freedom = len(differences) - 1
    bound = error * (T_975[freedom - 1] if freedom <= len(T_975) else T_975_MORE)
    if abs(mean) <= max(bound, EQUAL):
        return "within error"
    return "yes" if expected == direction_of(mean) else "no"


def summary(rows: Sequence[Row]) -> str:
    """How many of the paper's directions reproduce, in one line."""
    judged = [row.verdict for row in rows if row.verdict]
    counts = {verdict: judged.count(verdict) for verdict in ("yes", "no", "within error", "one seed", "not measured")}
    words = {
        "yes": "reproduce",
        "no": "do not",
        "within error": "are within error",
        "one seed": "have one seed, too few to tell",
        "not measured": "are not measured",
    }
    parts = [f"{number} {words[verdict]}" for verdict, number in counts.items() if number or verdict in ("yes", "no")]
    return f"{len(judged)} directions of the paper's: {', '.join(parts)}"


def _check_field(study: Study, metric: Metric, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where there are records, evaluated as the metric asks, and none has its field."""
    above = ["evaluations", metric.evaluator] if metric.evaluator else []
    places = [place for record in records if (place := _field(record, above)) is not None]
    step = metric.field.split(".")[len(above)]
    if places and not any(step in place for place in places):
        raise UserError(
            f"study {study.name}: no result has metric.field={metric.field}; results have {', '.join(places[0])}. "
            "Correct the study, or measure it first"
        )


def _field(record: Mapping[str, Any], steps: Sequence[str]) -> Any:
    """A field within a field of a record; None where it has none."""
    value: Any = record
    for step in steps:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _row(
    grid: Grid,
    variant: Variant,
    values: Mapping[str, tuple[float | None, ...]],
    records: Sequence[Mapping[str, Any] | None],
    notes: tuple[str, ...],
) -> Row:
    own, metric = values[variant.name], grid.study.metric_of(variant)
    mean, error = mean_and_error([value for value in own if value is not None])
    other = grid.scale.compared_with(variant)
    differences: list[float] = []
    paper_difference, expected = None, variant.direction
    if other is not None:
        pairs = zip(own, values[other.name], strict=True)
        differences = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
        if variant.paper is not None and other.paper is not None:
            paper_difference = variant.paper - other.paper
            expected = direction_of(paper_difference)
    difference, difference_error = mean_and_error(differences)
    return Row(
        name=variant.name,
        label=variant.label,
        measure=metric.title,
        digits=metric.digits,
        network=variant.network,
        against=other.name if other else "",
        paper=variant.paper,
        paper_difference=paper_difference,
        paper_direction=expected,
        values=own,
        mean=mean,
        error=error,
        difference=difference,
        difference_error=difference_error,
        verdict=judge(expected, differences),
        keys=tuple(str(record["key"]) for record in records if record is not None),
        notes=notes,
    )


def _records(grid: Grid, variant: Variant, measured: Measurements) -> list[Mapping[str, Any] | None]:
    """The row's network of every seed, or None."""
    owner, (iteration, _, role) = grid.scale.owner(variant).name, variant.network.partition("/")
    found = []
    for seed in range(grid.seeds):
        records = measured.records.get((owner, seed), ())
        found.append(next((r for r in records if (str(r["iteration"]), r["role"]) == (iteration, role)), None))
    return found


def _notes(grid: Grid, variant: Variant, measured: Measurements) -> tuple[str, ...]:
    owner = grid.scale.owner(variant).name
    found = {seed: measured.notes.get((owner, seed)) for seed in range(grid.seeds)}
    return tuple(f"seed {seed} {note}" for seed, note in found.items() if note)
