import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.selection.rank import Limit, find_limits
from tasks.selection.scan import Batch
from tests.tasks.selection.predicted import NAMES, predicted

# Ranks that agree in their high bits, in their low bits, or entirely.
ranks_of_images = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, 1 << 20, (1 << 20) + 1, (1 << 31) + 5, (1 << 32) - 1])),
    min_size=1,
    max_size=30,
)


def find(ranks: list[tuple[int, int]], wanted: list[int], **bounds: int) -> list[bool]:
    """Whether each image is within, by the limits that are found; image n has key kn."""
    rows = [(f"k{n}", label, 0.5) for n, (label, _) in enumerate(ranks)]
    with tempfile.TemporaryDirectory() as name:
        predictions = predicted(Path(name), [rows[:7], rows[7:]] if len(rows) > 7 else [rows])
        own = np.array([rank for _, rank in ranks])

        def competitors(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            asked = np.flatnonzero(np.array(wanted)[batch.labels])
            return asked, batch.labels[asked], own[batch.first_image + asked]

        competing = np.bincount([label for label, _ in ranks], minlength=3)
        limit: Limit = find_limits(predictions, competitors, competing, np.array(wanted), **bounds)

        def within(batch: Batch) -> list[bool]:
            places = batch.first_image + np.arange(len(batch))
            return limit.within(batch.labels, own[places], batch.keys).tolist()

        return [found for batch in predictions.scan(within) for found in batch]


@given(ranks_of_images, st.tuples(*[st.floats(0, 1)] * len(NAMES)), st.integers(1, 40), st.integers(0, 10))
def test_exactly_the_first_by_rank_and_key_are_within_whatever_the_bounds_of_memory(
    ranks: list[tuple[int, int]], shares: tuple[float, ...], counters: int, most_candidates: int
) -> None:
    own = [sorted((r, f"k{n}") for n, (of, r) in enumerate(ranks) if of == label) for label in range(3)]
    wanted = [round(share * len(images)) for share, images in zip(shares, own, strict=True)]
    first = {key for images, count in zip(own, wanted, strict=True) for _, key in images[:count]}
    found = find(ranks, wanted, counters=counters, most_candidates=most_candidates)
    assert {f"k{n}" for n, inside in enumerate(found) if inside} == first
