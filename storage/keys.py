"""Identity: canonical JSON, digests, and the base class of every typed config.

The key of an artifact is a digest of what must change its result. A config enters the key without the fields that
stand at their default, so a field added later changes no existing key; a changed default must raise the stage's
version (tests/flows/test_golden_keys.py pins both).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

KEY_HEX = 32  # 128 bits: no collision among 10^12 artifacts to be feared
HASH_BLOCK_BYTES = 1 << 20


class Config(BaseModel):
    """A frozen, typed setting. Unknown fields, infinities and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    not_in_key: ClassVar[tuple[str, ...]] = ()

    def key_fields(self) -> dict[str, Any]:
        """The fields that enter a key: those that differ from their default, as plain JSON values."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.not_in_key))


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no white space, UTF-8.

    Raises ValueError on NaN and infinities, TypeError on what JSON has no word for.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest(value: Any) -> str:
    """The first 128 bits of the sha256 of `value`'s canonical JSON, as 32 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:KEY_HEX]


def artifact_key(stage: str, version: int, config: dict[str, Any], inputs: dict[str, str], generation: int = 0) -> str:
    """The key of the artifact that a stage makes.

    `config` is `Config.key_fields()`, `inputs` maps a role to the key of the artifact in that role. `generation` counts
    forced reruns; 0 is left out, so that a first run and a run without reruns agree.
    """
    identity: dict[str, Any] = {"stage": stage, "version": version, "config": config, "inputs": inputs}
    if generation:
        identity["generation"] = generation
    return digest(identity)


def file_sha256(path: Path) -> str:
    """The sha256 of a local file, as 64 hex digits, read in blocks."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()
