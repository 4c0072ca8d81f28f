"""The rules of a selection: filter by confidence, balance the classes. First found for each class, then applied.

Once the rules of the classes are known, an image's fate is a function of its own prediction alone: so predictions are
decided in any order, in parallel, one row group at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa

from storage.errors import UserError
from tasks.selection.chance import LUCK, SUBSET, draw
from tasks.selection.config import SelectConfig
from tasks.selection.rank import RANK_BITS, Limit, find_limits
from tasks.selection.scan import ONE_BITS, Batch, Predictions

DECISIONS = (
    "kept",
    "below_confidence",  # of the filter
    "above_confidence",  # of the filter
    "over_cap",  # passed the filter, but the class has enough more confident ones
    "not_drawn",  # method reference: above the class's threshold, but chance gave it no copy
    "not_in_subset",  # would be kept, but chance left it out of the subset
)
KEPT, BELOW, ABOVE, OVER_CAP, NOT_DRAWN, NOT_IN_SUBSET = range(len(DECISIONS))
GRID = (np.arange(101) / 100).astype(np.float32)  # of method reference's thresholds
CONFIDENCE_SHIFT = RANK_BITS - 30  # the bits of floats in [0, 1] fill 30


@dataclass(frozen=True)
class ClassCounts:
    """Images of each class by decision, int64 [classes, len(DECISIONS)], and copies to be written, int64 [classes]."""

    decisions: np.ndarray
    copies: np.ndarray

    @classmethod
    def none(cls, num_classes: int) -> Self:
        """Counts to add to."""
        return cls(np.zeros((num_classes, len(DECISIONS)), np.int64), np.zeros(num_classes, np.int64))

    def add(self, labels: np.ndarray, decisions: np.ndarray, copies: np.ndarray) -> None:
        """Count some decided images."""
        classes = labels.astype(np.int64)  # other types take ufunc.at's slow path
        np.add.at(self.decisions.reshape(-1), classes * len(DECISIONS) + decisions, 1)
        np.add.at(self.copies, classes, copies.astype(np.int64))

    @property
    def available(self) -> np.ndarray:
        """Images labeled as each class, int64 [classes]."""
        return self.decisions.sum(axis=1)

    @property
    def kept(self) -> np.ndarray:
        """Images of each class that are kept, int64 [classes]."""
        return self.decisions[:, KEPT]

    def table(self, class_names: Sequence[str]) -> pa.Table:
        """A row a class: label, class_name; available, of these kept and dropped; duplicated (copies beyond the first) and
        all copies; and the dropped ones by decision."""
        columns = {
            "label": np.arange(len(self.copies), dtype=np.int32),
            "class_name": pa.array(class_names, pa.string()),
            "available": self.available,
            "kept": self.kept,
            "dropped": self.available - self.kept,
            "duplicated": self.copies - self.kept,
            "copies": self.copies,
        }
        return pa.table(columns | {DECISIONS[code]: self.decisions[:, code] for code in range(1, len(DECISIONS))})


@dataclass(frozen=True)
class Rules:
    """What decides an image's fate, by class: arrays [classes].

    least: float32, of the filter; threshold: float32 >= least, of the class; base: int64, copies of each image above
    the threshold; images within `limit` get one more. The limit is in the order of confidence where `by_confidence`
    (a class above its cap), else in an order of chance.
    """

    config: SelectConfig
    least: np.ndarray
    threshold: np.ndarray
    base: np.ndarray
    by_confidence: np.ndarray
    limit: Limit

    def decide(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Of each prediction the decision, int8 [n] (its place in DECISIONS), and the copies, int32 [n]; 0: not kept."""
        config, labels, confidences = self.config, batch.labels, batch.confidences
        ranks = rank_images(labels, confidences, batch.key_hashes, self.by_confidence, config.seed)
        copies = self.base[labels] + self.limit.within(labels, ranks, batch.keys)
        decisions = np.full(len(batch), KEPT, np.int8)
        decisions[copies == 0] = NOT_DRAWN if config.method == "reference" else OVER_CAP
        decisions[confidences < self.threshold[labels]] = OVER_CAP
        decisions[confidences < self.least[labels]] = BELOW
        if config.max_confidence is not None:
            decisions[confidences >= np.float32(config.max_confidence)] = ABOVE
        if config.subset < 1:
            outside = draw(batch.key_hashes, config.seed, SUBSET) >= np.uint64(int(config.subset * 2.0**64))
            decisions[outside & (decisions == KEPT)] = NOT_IN_SUBSET
        copies[decisions != KEPT] = 0
        return decisions, copies.astype(np.int32)

    def thresholds(self) -> np.ndarray:
        """The least confidence that a kept image of each class can have, float32 [classes]."""
        cut = ONE_BITS - (self.limit.rank >> CONFIDENCE_SHIFT).astype(np.uint32)
        return np.where(self.by_confidence, cut.view(np.float32), self.threshold)


def rank_images(
    labels: np.ndarray, confidences: np.ndarray, key_hashes: np.ndarray, by_confidence: np.ndarray, seed: int
) -> np.ndarray:
    """The ranks that limits are in: falling confidence or chance, as the image's class says. int64 [n] in [0, 2^32)."""
    falling = (ONE_BITS - confidences.view(np.uint32)).astype(np.int64) << CONFIDENCE_SHIFT
    luck = (draw(key_hashes, seed, LUCK) >> np.uint64(64 - RANK_BITS)).astype(np.int64)
    return np.where(by_confidence[labels], falling, luck)


def find_rules(predictions: Predictions, config: SelectConfig) -> Rules:
    """The rules by which these predictions are selected.

    Raises UserError where a class stays empty and `on_empty_class` is error, or where nothing passes the filter.
    """
    edges, steps = count_steps(predictions, config)
    least, passing = _filter(predictions.class_names, config, steps)
    by_chance = np.zeros(len(passing), bool)  # no class by confidence
    if not config.balance:
        return Rules(config, least, least, np.ones_like(passing), by_chance, Limit.at(np.zeros_like(passing)))
    cap = config.images_per_class
    if config.method == "reference":
        threshold, above = _grid_thresholds(edges, passing_steps(config, steps), cap)
        share = [((cap % number) << RANK_BITS) // number if number else 0 for number in above.tolist()]
        limit = Limit.at(np.array(share, np.int64))
        return Rules(config, least, threshold, _per_image(cap, above), by_chance, limit)
    crowded = passing > cap
    base = np.where(crowded, 0, _per_image(cap, passing))
    wanted = np.where(passing > 0, cap - base * passing, 0)

    def competitors(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inside = (wanted[batch.labels] > 0) & (batch.confidences >= least[batch.labels])
        if config.max_confidence is not None:
            inside &= batch.confidences < np.float32(config.max_confidence)
        rows = np.flatnonzero(inside)
        labels, confidences, key_hashes = (c[rows] for c in (batch.labels, batch.confidences, batch.key_hashes))
        return rows, labels, rank_images(labels, confidences, key_hashes, crowded, config.seed)

    limit = find_limits(predictions, competitors, passing, wanted)
    return Rules(config, least, least, base, crowded, limit)


def count_classes(predictions: Predictions, config: SelectConfig) -> ClassCounts:
    """What a selection keeps, drops and duplicates, without making it. Raises UserError as `find_rules` does.

    One pass, unless chance decides a number: then as many as the selection itself makes.
    """
    counts = ClassCounts.none(predictions.num_classes)
    if config.method == "exact" and config.subset == 1:
        _, steps = count_steps(predictions, config)
        _, passing = _filter(predictions.class_names, config, steps)
        kept = np.minimum(passing, config.images_per_class) if config.balance else passing
        counts.copies[:] = np.where(passing > 0, config.images_per_class, 0) if config.balance else kept
        counts.decisions[:, KEPT], counts.decisions[:, OVER_CAP] = kept, passing - kept
        if config.max_confidence is not None:
            counts.decisions[:, ABOVE] = steps[:, -1]
        counts.decisions[:, BELOW] = steps.sum(axis=1) - counts.available
        return counts
    rules = find_rules(predictions, config)
    for labels, decisions, copies in predictions.scan(lambda batch: (batch.labels, *rules.decide(batch))):
        counts.add(labels, decisions, copies)
    return counts


def count_steps(predictions: Predictions, config: SelectConfig) -> tuple[np.ndarray, np.ndarray]:
    """Images by class and step of confidence: the edges, float32 rising; counts, int64 [classes, len(edges) + 1].

    Step 0 is below min_confidence, the last one at or above max_confidence (where there is one).
    """
    least = np.float32(config.min_confidence)
    most = np.float32(np.inf if config.max_confidence is None else config.max_confidence)
    grid = GRID[(least < GRID) & (most > GRID)] if config.method == "reference" else GRID[:0]
    edges = np.concatenate([[least], grid, [most] if np.isfinite(most) else []]).astype(np.float32)
    counts = np.zeros((predictions.num_classes, len(edges) + 1), np.int64)

    def places(batch: Batch) -> np.ndarray:
        return batch.labels * np.int64(counts.shape[1]) + np.searchsorted(edges, batch.confidences, side="right")

    for found in predictions.scan(places):
        np.add.at(counts.reshape(-1), found, 1)
    return edges, counts


def passing_steps(config: SelectConfig, steps: np.ndarray) -> np.ndarray:
    """Of counts by step those that pass the filter."""
    return steps[:, 1:] if config.max_confidence is None else steps[:, 1:-1]


def _filter(class_names: Sequence[str], config: SelectConfig, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least confidence, float32 [classes], and how many images pass, int64 [classes]. Raises UserError on empty ones."""
    passing = passing_steps(config, steps).sum(axis=1)
    least = np.full(len(passing), np.float32(config.min_confidence))
    empty = passing == 0
    if config.on_empty_class == "best":
        least[empty], passing[empty] = 0, steps[empty, 0]
    empty = np.flatnonzero(passing == 0)
    if len(empty) and (config.on_empty_class == "error" or len(empty) == len(passing)):
        others = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        bound = "" if config.max_confidence is None else f" and < {config.max_confidence:.2f}"
        remedies = ["Lower select.min_confidence"]
        if config.on_empty_class == "error":
            remedies.append("set select.on_empty_class=skip")
            if config.balance and config.method == "exact":
                remedies.append("=best for its most confident ones")
        raise UserError(
            f"class {empty[0]} ({class_names[empty[0]]}){others} has 0 images at confidence >= {config.min_confidence:.2f}"
            f"{bound}, so {'it cannot be balanced' if config.balance else 'nothing is selected of it'}. "
            + ", or ".join(remedies)
        )
    return least, passing


def _grid_thresholds(edges: np.ndarray, steps: np.ndarray, cap: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each class the highest edge above which it has enough images (else the lowest), and how many lie above it."""
    above = steps[:, ::-1].cumsum(axis=1)[:, ::-1]
    place = np.maximum((above >= cap).sum(axis=1) - 1, 0)  # `above` falls along the edges
    return edges[place], above[np.arange(len(above)), place]


def _per_image(cap: int, images: np.ndarray) -> np.ndarray:
    """Whole copies of each image that a class of so many can give all of them, int64 [classes]."""
    return np.where(images > 0, cap // np.maximum(images, 1), 0)
