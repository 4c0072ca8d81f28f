"""How an artifact's predictions are computed (dtype, layout, compiled): agreed on once, followed by every later attempt."""

from collections.abc import Callable, Sequence
from typing import Any

from models.numerics import asked_otherwise, part_numerics
from storage.artifacts import agree_numerics, agreed_numerics, find_parts
from storage.errors import UserError
from tasks.contract import StageContext


def agree(
    context: StageContext,
    kind: str,
    part_stage: str,
    keys: Sequence[str],
    stage: str,
    choose: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """The numerics of the artifact in the making: those of an earlier attempt, else what `choose` says.

    `keys`: of its parts, of `part_stage`; `stage`: what --rerun takes. An attempt that made no part, because it failed or was
    broken off, binds nobody who asks for other numerics. Raises UserError where parts were made as this run does not allow.
    """
    agreed = agreed_numerics(context.store, kind, context.key)
    if agreed is not None:
        otherwise = asked_otherwise(context.compute, agreed)
        found = find_parts(context.store, part_stage, keys, part_numerics(agreed)) if otherwise else {}
        made = sum(part is not None for part in found.values())
        if not otherwise or made == len(keys):
            return agreed
        if made:
            then = ", ".join(f"{name}={value}" for name, value in otherwise.items())
            raise UserError(
                f"{made} of {len(keys)} parts of these predictions were made with {then}, which this run does not allow; "
                f"finish them with that, or make all anew with --rerun {stage}"
            )
    return agree_numerics(context.store, kind, context.key, choose(), instead_of=agreed)
