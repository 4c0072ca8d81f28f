import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.hamming import HammingIndex, cut


def clustered(rng: np.random.Generator, count: int, num_centers: int) -> np.ndarray:
    """Hashes a few bits from one of some centers, so that pairs at every small distance occur."""
    centers = rng.integers(0, 2**64, num_centers, dtype=np.uint64)
    hashes = centers[rng.integers(0, num_centers, count)]
    for _ in range(10):
        hashes = hashes ^ np.where(
            rng.random(count) < 0.5, np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64), 0
        )
    return hashes.astype(np.uint64)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), num=st.integers(0, 300), num_queries=st.integers(0, 150), radius=st.integers(0, 16))
def test_the_search_finds_what_comparing_all_pairs_finds(seed: int, num: int, num_queries: int, radius: int) -> None:
    rng = np.random.default_rng(seed)
    mixed = clustered(rng, num + num_queries, 3)
    hashes, queries = mixed[:num], mixed[num:]
    bits = np.bitwise_count(queries[:, None] ^ hashes[None, :])
    rows, numbers = np.nonzero(bits <= radius)
    found = HammingIndex(hashes, radius).search(queries)
    assert [column.tolist() for column in found] == [rows.tolist(), numbers.tolist(), bits[rows, numbers].tolist()]


@pytest.mark.parametrize("radius", [0, 7, 8, 12])
def test_large_sets_are_searched_exactly_too(radius: int) -> None:
    rng = np.random.default_rng(1)
    hashes = clustered(rng, 200_000, 5_000)
    queries = hashes[:40]
    expected = [np.flatnonzero(np.bitwise_count(query ^ hashes) <= radius).tolist() for query in queries]
    rows, numbers, _ = HammingIndex(hashes, radius).search(queries)
    assert [numbers[rows == row].tolist() for row in range(len(queries))] == expected


@given(num=st.integers(0, 10**8), radius=st.integers(0, 16))
def test_the_pieces_cover_all_bits_once_and_no_pair_can_slip_through(num: int, radius: int) -> None:
    pieces = cut(num, radius)
    assert [bit for low, bits, _ in pieces for bit in range(low, low + bits)] == list(range(64))
    assert sum(changes + 1 for _, _, changes in pieces) > radius, "one piece must differ in no more than its changes"
