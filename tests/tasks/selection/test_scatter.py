"""Rows come back in the order of their places, whatever their order of arrival, the groups and the spills."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tasks.selection.scatter import Scatter


@pytest.mark.parametrize("group_rows", [1, 7, 100])
@pytest.mark.parametrize("spill_bytes", [1, 60, 1 << 20])
def test_rows_come_back_in_the_order_of_their_places(tmp_path: Path, group_rows: int, spill_bytes: int) -> None:
    rng = np.random.default_rng(0)
    places, soft = rng.permutation(40), rng.random((40, 3)).astype(np.float16)
    scatter = Scatter(tmp_path, group_rows, 3, spill_bytes)
    for own in np.array_split(places, 6):
        scatter.add(own, pa.table({"name": [f"image {n}" for n in own]}), soft[own])
    found = list(scatter.groups())
    assert [len(facts) for facts, _ in found[:-1]] == [group_rows] * (len(found) - 1)
    assert [name for facts, _ in found for name in facts["name"].to_pylist()] == [f"image {n}" for n in range(40)]
    assert np.array_equal(np.concatenate([labels for _, labels in found]), soft)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], "the disk is given back"
