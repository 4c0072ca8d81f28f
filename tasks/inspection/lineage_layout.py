"""Where the boxes of a lineage graph are drawn: layers from left to right, few crossings, boxes beside what they belong to.

After Sugiyama, Tagawa and Toda (1981), without boxes for edges that cross layers: those count less instead.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

SWEEPS = 8  # over all layers, to and fro
Edge = tuple[str, str]
Pulls = Mapping[str, Sequence[tuple[str, float]]]


def place(layers: Mapping[str, int], edges: Iterable[Edge], order: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Of each node its layer and its row; rows of a layer are at least 1 apart, the first row of all is 0.

    `layers`: every edge (from, to) leads to a higher one. A node without inputs moves beside the first that uses it.
    `order`: all nodes as they would stand within a layer if nothing pulled them.
    """
    edges = [edge for edge in edges if edge[0] in layers and edge[1] in layers]
    moved = _beside_users(layers, edges)
    columns: dict[int, list[str]] = defaultdict(list)
    for key in order:
        columns[moved[key]].append(key)
    left, right = _pulls(moved, edges)
    rows = {key: float(n) - len(own) / 2 for own in columns.values() for n, key in enumerate(own)}
    for _ in range(SWEEPS):
        for numbers, pulls in ((sorted(columns), left), (sorted(columns, reverse=True), right)):
            for number in numbers:
                _settle(columns[number], rows, pulls, sort=True)
    both = {key: [*left[key], *right[key]] for key in moved}
    for _ in range(SWEEPS):
        for number in sorted(columns):
            _settle(columns[number], rows, both, sort=False)
    top = min(rows.values(), default=0.0)
    return {key: (number, rows[key] - top) for key, number in moved.items()}


def spread(wanted: Sequence[float]) -> list[float]:
    """Places in the same order, at least 1 apart, whose squared distances from those wanted are least together."""
    blocks: list[list[float]] = []  # sum, number: stretches of places that are exactly 1 apart
    for number, place in enumerate(wanted):
        blocks.append([place - number, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    means = [total / count for total, count in blocks for _ in range(int(count))]
    return [mean + number for number, mean in enumerate(means)]


def _beside_users(layers: Mapping[str, int], edges: Sequence[Edge]) -> dict[str, int]:
    made = {end for _, end in edges}
    first_use: dict[str, int] = {}
    for start, end in edges:
        first_use[start] = min(first_use.get(start, layers[end]), layers[end])
    return {key: n if key in made else first_use.get(key, n + 1) - 1 for key, n in layers.items()}


def _pulls(layers: Mapping[str, int], edges: Sequence[Edge]) -> tuple[Pulls, Pulls]:
    """What pulls each node, and how much: from its left, from its right. Long edges, and what many were made from, pull less."""
    uses = Counter(start for start, _ in edges)
    left: dict[str, list[tuple[str, float]]] = {key: [] for key in layers}
    right: dict[str, list[tuple[str, float]]] = {key: [] for key in layers}
    for start, end in edges:
        weight = 1 / max(layers[end] - layers[start], 1) ** 2
        left[end].append((start, weight / uses[start]))
        right[start].append((end, weight))
    return left, right


def _settle(column: list[str], rows: dict[str, float], pulls: Pulls, sort: bool) -> None:
    """Move the nodes of a layer to the mean of what pulls them, each where there is room."""
    wanted = {key: rows[key] for key in column}
    for key in column:
        total = sum(weight for _, weight in pulls[key])
        if total:
            wanted[key] = sum(rows[other] * weight for other, weight in pulls[key]) / total
    if sort:
        column.sort(key=lambda key: wanted[key])
    for key, row in zip(column, spread([wanted[key] for key in column]), strict=True):
        rows[key] = row
