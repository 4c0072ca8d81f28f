"""The seal of a record: a digest of its own fields, so that a flipped byte or an edit by hand is found."""

import json
from typing import Any

from pydantic import BaseModel

from storage.keys import digest

SEAL = "seal"


def sealed(record: BaseModel | dict[str, Any]) -> bytes:
    """A record as JSON with its own digest."""
    fields = record.model_dump(mode="json") if isinstance(record, BaseModel) else record
    return json.dumps({**fields, SEAL: digest(fields)}, indent=1, ensure_ascii=False, allow_nan=False).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """The fields of a sealed record. Raises ValueError where they are not those that were sealed."""
    fields = json.loads(data)
    if not isinstance(fields, dict) or SEAL not in fields:
        raise ValueError("it has no seal")
    seal = fields.pop(SEAL)
    if seal != digest(fields):
        raise ValueError("its seal does not fit its content")
    return fields
