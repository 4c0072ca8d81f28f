import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from storage.keys import Config, artifact_key, canonical_json, digest, file_sha256

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=15,
)


class NoiseOf(Config):
    level: float = 9.0


class Training(Config):
    not_in_key: ClassVar[tuple[str, ...]] = ("device",)

    epochs: float = Field(10.0, gt=0)
    noise: NoiseOf = NoiseOf()
    device: str = "cpu"


class GrownTraining(Training):
    added_later: int = 3


def reordered(value: Any) -> Any:
    """The same value with every mapping's entries the other way round."""
    if isinstance(value, dict):
        return {name: reordered(value[name]) for name in reversed(list(value))}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def key(config: Config, **changes: Any) -> str:
    identity = {"stage": "train", "version": 1, "inputs": {"data": "d1"}, **changes}
    return artifact_key(config=config.key_fields(), **identity)


@given(json_values)
def test_canonical_json_does_not_depend_on_the_order_of_entries(value: Any) -> None:
    assert canonical_json(reordered(value)) == canonical_json(value)
    assert digest(reordered(value)) == digest(value)


@given(json_values)
def test_canonical_json_is_json_of_the_same_value(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(json_values, json_values)
def test_other_values_have_other_digests(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == (canonical_json(one) == canonical_json(other))


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_numbers_that_json_has_no_word_for_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


def test_a_digest_is_128_bits_and_never_changes() -> None:
    assert canonical_json({"b": 1, "a": ["é", None, 1.5]}) == '{"a":["é",null,1.5],"b":1}'.encode()
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e"  # sha256 of the two bytes {}


def test_fields_at_their_default_do_not_enter_the_key() -> None:
    assert Training().key_fields() == {}
    assert Training(epochs=10, noise=NoiseOf(level=9)).key_fields() == {}
    assert Training(epochs=11, noise=NoiseOf(level=5)).key_fields() == {"epochs": 11.0, "noise": {"level": 5.0}}


def test_a_field_that_was_added_later_changes_no_key_while_at_its_default() -> None:
    assert key(GrownTraining(epochs=5)) == key(Training(epochs=5))
    assert key(GrownTraining(epochs=5, added_later=4)) != key(Training(epochs=5))


def test_fields_that_cannot_change_the_result_do_not_enter_the_key() -> None:
    assert key(Training(device="cuda")) == key(Training())
    assert "device" not in Training(device="cuda", epochs=3).key_fields()


def test_a_whole_number_and_the_same_float_are_one_setting() -> None:
    assert key(Training(epochs=5)) == key(Training(epochs=5.0))


def test_generation_0_is_left_out_of_the_key() -> None:
    first = key(Training())
    assert key(Training(), generation=0) == first
    assert first == digest({"stage": "train", "version": 1, "config": {}, "inputs": {"data": "d1"}})
    assert len({first, key(Training(), generation=1), key(Training(), generation=2)}) == 3


@pytest.mark.parametrize(
    "change", [{"stage": "label"}, {"version": 2}, {"inputs": {"data": "d2"}}, {"inputs": {"selection": "d1"}}]
)
def test_stage_version_and_inputs_change_the_key(change: dict[str, Any]) -> None:
    assert key(Training(), **change) != key(Training())


def test_the_order_of_inputs_does_not_change_the_key() -> None:
    assert key(Training(), inputs={"a": "1", "b": "2"}) == key(Training(), inputs={"b": "2", "a": "1"})


def test_a_config_is_frozen_and_refuses_unknown_fields_and_infinities() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Training().epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Training(epoch=3)  # type: ignore[call-arg]
    for value in (math.inf, math.nan):
        with pytest.raises(ValidationError, match="finite number"):
            Training(epochs=value)


def test_a_files_sha256_is_that_of_its_bytes_across_blocks(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "zeros").write_bytes(bytes(3_000_000))  # more than two blocks
    # from coreutils: head -c 3000000 /dev/zero | sha256sum
    assert file_sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert file_sha256(tmp_path / "zeros") == "35bce4eae54ec8e6cc2868baa8d157914d6ae2858811b4cc0c078c94460fa26f"
