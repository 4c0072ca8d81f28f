import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from tasks.inspection.lineage_layout import place, spread

PLACES = st.lists(st.floats(-50, 50), min_size=1, max_size=20)


@given(PLACES)
def test_spread_keeps_the_order_and_the_distance(wanted: list[float]) -> None:
    found = spread(wanted)
    assert all(b - a >= 1 - 1e-9 for a, b in itertools.pairwise(found))
    assert abs(sum(found) - sum(wanted)) < 1e-6, "the middle of all stays where it was wanted"


@given(PLACES, st.randoms(use_true_random=False))
def test_no_other_places_are_nearer_to_those_wanted(wanted: list[float], chance: random.Random) -> None:
    best = sum((a - b) ** 2 for a, b in zip(spread(wanted), wanted, strict=True))
    for _ in range(20):
        other = spread([place + chance.uniform(-3, 3) for place in wanted])
        assert best <= sum((a - b) ** 2 for a, b in zip(other, wanted, strict=True)) + 1e-6


def test_places_that_are_apart_already_stay() -> None:
    assert spread([-3.5, 0.0, 1.0, 7.25]) == [-3.5, 0.0, 1.0, 7.25]


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_no_two_boxes_overlap_and_every_edge_leads_to_the_right(width: int, height: int, chance: random.Random) -> None:
    layers = {f"{layer}-{n}": layer for layer in range(width) for n in range(height)}
    edges = [
        (f"{layer - 1}-{chance.randrange(height)}", f"{layer}-{n}") for layer in range(1, width) for n in range(height)
    ]
    edges += [("0-0", f"{width - 1}-0")] if width > 1 else []
    places = place(layers, edges, sorted(layers, key=lambda key: chance.random()))
    assert all(places[start][0] < places[end][0] for start, end in edges)
    for layer in range(width):
        rows = sorted(row for number, row in places.values() if number == layer)
        assert all(b - a >= 1 - 1e-9 for a, b in itertools.pairwise(rows))
    assert min(row for _, row in places.values()) == 0


def test_chains_side_by_side_are_drawn_without_a_crossing() -> None:
    """However they were mixed up, and with a node that all of them share."""
    chance = random.Random(3)
    layers = {"shared": 0} | {f"{chain}-{layer}": layer for chain in range(9) for layer in range(1, 5)}
    edges = [("shared", f"{chain}-1") for chain in range(9)]
    edges += [(f"{chain}-{layer}", f"{chain}-{layer + 1}") for chain in range(9) for layer in range(1, 4)]
    places = place(layers, edges, sorted(layers, key=lambda key: chance.random()))
    orders = [sorted(range(9), key=lambda chain: places[f"{chain}-{layer}"][1]) for layer in range(1, 5)]
    assert all(order == orders[0] for order in orders)


def test_what_was_made_from_nothing_stands_beside_its_first_user() -> None:
    places = place(
        {"a": 0, "b": 1, "c": 2, "files": 0}, [("a", "b"), ("b", "c"), ("files", "c")], ["a", "b", "c", "files"]
    )
    assert {key: layer for key, (layer, _) in places.items()} == {"a": 0, "b": 1, "c": 2, "files": 1}
