from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tasks.selection import layout
from tasks.selection.layout import Shuffle, draw_copies
from tests.tasks.selection.predicted import chance, predicted, splitmix

ROWS = [(f"k{n}", 0, 0.5) for n in range(500)]
COPIES = np.array([n % 4 for n in range(500)])


def shuffled(folder: Path, cuts: list[int], buckets: int, seed: int = 3) -> list[tuple[str, int]]:
    """Key and copy number of each copy in the order of the layout files."""
    bounds = [0, *cuts, len(ROWS)]
    predictions = predicted(folder, [ROWS[a:b] for a, b in pairwise(bounds)])
    total = int(COPIES.sum())
    with Shuffle(folder, total, bucket_copies=-(-total // buckets)) as shuffle:

        def split(batch):
            own = COPIES[batch.first_image : batch.first_image + len(batch)]
            return [shuffle.split(*piece) for piece in draw_copies(batch, own, seed)]

        for pieces in predictions.scan(split):
            for by_bucket in pieces:
                shuffle.add(by_bucket)
        files = shuffle.write(folder, shard_images=40)
    assert [rows for _, rows in files] == [total]
    table = pq.read_table(files[0][0])
    return list(zip([ROWS[n][0] for n in table["image"].to_pylist()], table["copy"].to_pylist(), strict=True))


def test_every_copy_stands_once_in_the_order_of_its_draw(tmp_path: Path) -> None:
    wanted = [
        (splitmix((chance(key, 3, 3) + copy) % 2**64), key, copy)
        for (key, _, _), copies in zip(ROWS, COPIES, strict=True)
        for copy in range(copies)
    ]
    assert shuffled(tmp_path, [], 1) == [(key, copy) for _, key, copy in sorted(wanted)]


@pytest.mark.parametrize(("cuts", "buckets"), [([], 2), ([1, 2, 250], 16), ([499], 200)])
def test_files_and_buckets_change_no_order(tmp_path: Path, cuts: list[int], buckets: int) -> None:
    assert shuffled(tmp_path / "cut", cuts, buckets) == shuffled(tmp_path / "whole", [], 1)
    assert not list(tmp_path.glob("*/bucket-*"))


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    first, second = (shuffled(tmp_path / str(seed), [], 4, seed) for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_layout_files_hold_whole_shards_and_the_last_one_the_rest(tmp_path: Path) -> None:
    predictions = predicted(tmp_path, [ROWS])
    per_file = layout.LAYOUT_COPIES // 3000 * 3000
    with Shuffle(tmp_path, 2_200_000) as shuffle:
        copies = np.full(len(ROWS), 4400)
        pieces = [
            piece for found in predictions.scan(lambda batch: list(draw_copies(batch, copies, 0))) for piece in found
        ]
        assert [len(draws) for draws, _ in pieces] == [1 << 20, 1 << 20, 2_200_000 - (2 << 20)]
        for piece in pieces:
            shuffle.add(shuffle.split(*piece))
        files = shuffle.write(tmp_path, 3000)
    assert [rows for _, rows in files] == [per_file, per_file, 2_200_000 - 2 * per_file]
    images = np.concatenate([pq.read_table(path)["image"].to_numpy() for path, _ in files])
    assert (np.bincount(images) == 4400).all()
    halves = np.bincount(images[:1_100_000], minlength=500)
    assert abs(halves - 2200).max() < 6 * (4400 / 4) ** 0.5, "each image's copies are spread over the whole"
