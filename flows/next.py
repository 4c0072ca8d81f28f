"""One more iteration on top of a finished run: the run's own config and one more student, taught by its latest.

The config is the one that the run recorded, so it needs no recipe file and no overrides to be said again. Used by the flow
`next_iteration` and by `nst next`. Imports neither torch nor Prefect.
"""

import copy
from collections.abc import Sequence

from flows.driver import Rerun, Run, resolve_run
from flows.experiment import Experiment, Recipe, resolve
from flows.overrides import apply_override, split_override
from storage.artifacts import find
from storage.errors import UserError
from storage.objects import Store
from storage.runs import RunRecord, list_runs, read_run

WITHOUT_EFFECT = (
    "compute",
    "data",
)  # sections with settings that change no result, such as compute.ranks and data.root


def next_run(store: Store, experiment: str, overrides: Sequence[str] = (), prefect_run: str = "") -> Run:
    """The newest finished run of an experiment with one more iteration; all former stages are reused. Writes nothing.

    The new student is trained like the latest one but for the overrides, e.g. `student.batch_ratio=28`. Records of
    `prefect_run` itself do not count, so that a Prefect run that is retried goes on with the iteration that it began.
    Raises UserError where no run is finished, or where a former stage would have to be made anew.
    """
    finished = newest_finished(store, experiment, prefect_run)
    run = resolve_run(with_another_iteration(finished, overrides), finished.recipe, store, Rerun(), prefect_run)
    changed = [
        node.name for node in finished.nodes if node.stage != "report" and run.records[node.name].key != node.key
    ]
    if changed:
        raise UserError(
            f"{changed[0]} of run {finished.name} would be made anew: its data, its settings, the program or a forced rerun "
            f"changed it since. Bring the experiment up to date first (nst run {finished.recipe}), then add an iteration"
        )
    return run


def newest_finished(store: Store, experiment: str, without: str = "") -> RunRecord:
    """The experiment's newest run of which every artifact is in the store, but for those of the Prefect run `without`."""
    records = [r for r in list_runs(store, experiment) if not without or r.prefect_run != without]
    for record in reversed(records):
        if _missing(store, record) is None:
            return record
    newest = records[-1] if records else read_run(store, experiment)  # raises with the experiments there are
    raise UserError(
        f"no run of {experiment!r} is finished, so there is no latest student; of {newest.name} {_missing(store, newest)} is "
        f"missing. Finish it first: nst run {newest.recipe}"
    )


def with_another_iteration(record: RunRecord, overrides: Sequence[str]) -> Experiment:
    """A run's experiment with its last iteration once more, changed by overrides of `student` (the new one alone).

    Raises UserError on an override that would change what is done already.
    """
    raw = copy.deepcopy(record.config)
    raw["iterations"].append(copy.deepcopy(raw["iterations"][-1]))
    own = f"iterations.{len(raw['iterations'])}"
    for text in overrides:
        dotted, value = split_override(text)
        section, _, rest = dotted.partition(".")
        if section == "student" and rest:
            dotted = f"{own}.{rest}"
        elif section not in WITHOUT_EFFECT and not dotted.startswith(f"{own}."):
            raise UserError(
                f"override {text!r}: it would change what is done already; set student.FIELD, which is {own} here, or run "
                "the recipe itself with more iterations"
            )
        apply_override(Recipe, raw, dotted, value, "override")
    return resolve(raw, f"{own} after {record.name}")


def _missing(store: Store, record: RunRecord) -> str | None:
    """The first stage of a run whose artifact is not in the store."""
    return next((node.name for node in record.nodes if find(store, node.kind, node.key) is None), None)
