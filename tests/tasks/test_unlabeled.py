"""The stage unlabeled: evaluation images left out and told, duplicates counted, broken images survived."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.compute import ComputeConfig, LocalEngine
from storage.errors import UserError
from storage.objects import Store
from storage.shards import read_index, read_table, shard_files
from storage.verify import verify_artifact
from tasks.report_images import leak_section
from tasks.unlabeled import count_duplicates
from tests.broken_images import broken_images, odd_images
from tests.real_images import encoded, png, pngs, write_images, write_splits
from tests.tasks.unlabeled_runs import committed, photograph, run, write_tar


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_splits(tmp_path / "images")


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Photographs; of the test images 0..3 leaked unchanged, smaller, as a bright JPEG and mirrored, one of validation too."""
    root = tmp_path / "images"
    root.mkdir()
    labels = [n % 3 for n in range(24)]
    for at, split in enumerate(("labeled", "val", "test")):
        write_images(root / f"{split}.parquet", [encoded(photograph(1000 * at + n)) for n in range(24)], labels, "abc")
    bright = photograph(2002).point(lambda value: min(255, int(value * 1.2)))
    leaks = [
        encoded(photograph(2000)),
        encoded(photograph(2001).resize((64, 64))),
        encoded(bright, "JPEG", quality=60),
        encoded(photograph(2003).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        encoded(photograph(1005), "WEBP"),
    ]
    write_images(root / "unlabeled.parquet", [*[encoded(photograph(9000 + n)) for n in range(25)], *leaks])
    return root


def test_evaluation_images_among_the_unlabeled_ones_are_left_out_and_told(store: Store, leaky: Path) -> None:
    manifest = committed(store, run(store, leaky))
    leaks = read_table(store, manifest.file("leaks.parquet")).to_pylist()
    assert [(row["key"], row["evaluation_key"], row["kind"]) for row in leaks] == [
        ("unlabeled-00000025", "test/test-00000000", "exact"),
        ("unlabeled-00000026", "test/test-00000001", "near"),
        ("unlabeled-00000027", "test/test-00000002", "near"),
        ("unlabeled-00000028", "test/test-00000003", "mirrored"),
        ("unlabeled-00000029", "val/val-00000005", "near"),
    ]
    assert leaks[0]["distance"] == 0
    assert leaks[0]["source"] == "unlabeled.parquet:25.png"
    keys = read_index(store, manifest, "unlabeled", ["key"])["key"].to_pylist()
    assert keys == [f"unlabeled-{n:08d}" for n in range(25)]
    assert [shard.rows for shard in shard_files(manifest, "unlabeled")] == [10, 10, 5]
    assert manifest.metrics["unlabeled"] == {"images": 25, "rejected": 0, "leaked": 5, "duplicates": 0}
    assert manifest.metrics["leaks"] == {"exact": 1, "mirrored": 1, "near": 3}


def test_the_report_shows_pairs_of_every_kind(store: Store, leaky: Path) -> None:
    manifest = committed(store, run(store, leaky))
    section = leak_section(store, manifest, manifest, most=3)
    assert section is not None
    assert (section["counts"], section["total"]) == ({"exact": 1, "mirrored": 1, "near": 3}, 5)
    assert [pair["kind"] for pair in section["pairs"]] == ["exact", "mirrored", "near"]
    exact = section["pairs"][0]
    assert exact["found"] == exact["evaluation"]
    assert section["pairs"][2]["found"] != section["pairs"][2]["evaluation"]
    assert leak_section(store, manifest.model_copy(update={"metrics": {}}), manifest, most=3) is None


def test_leaks_of_a_shard_of_which_nothing_is_left_are_shown_too(store: Store, leaky: Path) -> None:
    leaks = [encoded(photograph(2000 + n)) for n in range(20)]
    write_images(leaky / "unlabeled-a.parquet", leaks[:10])
    write_images(leaky / "unlabeled-b.parquet", leaks[10:])
    manifest = committed(store, run(store, leaky, unlabeled="unlabeled*.parquet", leaks={"max_distance": 0}))
    assert len(shard_files(manifest, "unlabeled")) == 3
    assert all(row["shard"] for row in read_table(store, manifest.file("leaks.parquet")).to_pylist())
    section = leak_section(store, manifest, manifest, most=100)
    assert section is not None
    assert (section["total"], len(section["pairs"])) == (21, 21)
    few = leak_section(store, manifest, manifest, most=4)
    assert few is not None
    keys = [pair["key"] for pair in section["pairs"]]
    assert [pair["key"] for pair in few["pairs"]] == [keys[n * 21 // 4] for n in range(4)], "evenly spread"
    assert verify_artifact(store, manifest).problems == []


def test_the_guard_can_be_switched_off_and_told_to_spare_mirror_images(store: Store, leaky: Path) -> None:
    assert run(store, leaky, leaks={"enabled": False}).metrics["unlabeled"]["images"] == 30
    assert run(store, leaky, leaks={"mirrored": False}).metrics["leaks"] == {"exact": 1, "near": 3}


def test_distance_0_means_the_same_bytes(store: Store, leaky: Path) -> None:
    """Many pictures of one digit are equal; only the file's copy is a leak."""
    table = pq.read_table(leaky / "unlabeled.parquet")
    same_pixels = [encoded(photograph(2000 + n), compress_level=1) for n in range(10)]
    rows = [row["image"]["bytes"] for row in table.to_pylist()]
    write_images(leaky / "unlabeled.parquet", [*rows, *same_pixels])
    result = run(store, leaky, leaks={"max_distance": 0})
    assert result.metrics["leaks"] == {"exact": 1}
    assert result.metrics["unlabeled"]["images"] == 39


def test_a_set_of_nothing_but_leaks_is_an_error_that_says_so(store: Store, leaky: Path) -> None:
    leaks = [encoded(photograph(2000 + n)) for n in range(20)]
    write_images(leaky / "unlabeled.parquet", [*leaks, b"text"])
    with pytest.raises(UserError, match=r"no image is left: 20 are copies .* and 1 cannot be decoded") as error:
        run(store, leaky)
    assert "data.unlabeled='unlabeled*.parquet'" in str(error.value)


def test_another_guard_makes_no_shard_anew(store: Store, leaky: Path) -> None:
    run(store, leaky)
    before = set(store.paths("parts/ingest"))
    write_images(leaky / "val.parquet", [encoded(photograph(9000 + n)) for n in range(24)], [n % 3 for n in range(24)])
    after = run(store, leaky)
    assert after.metrics["leaks"] == {"exact": 25, "mirrored": 1, "near": 2}
    assert after.metrics["unlabeled"]["images"] == 2
    made = set(store.paths("parts/ingest")) - before
    assert len({path.split("/")[2] for path in made}) == 3, "the three shards of val and no other"


def test_two_processes_guard_as_one(store: Store, tmp_path: Path, leaky: Path) -> None:
    both = run(Store(str(tmp_path / "other")), leaky, LocalEngine(ComputeConfig(processes=2)))
    assert both == run(store, leaky)


def test_exact_duplicates_are_counted_and_kept(store: Store, images: Path) -> None:
    write_images(images / "unlabeled.parquet", [*pngs(12, 5000), png(5001), png(5001), png(5002)])
    write_images(images / "unlabeled-more.parquet", [png(5003), png(7)])
    result = run(store, images, leaks={"enabled": False})
    assert result.metrics["unlabeled"] == {"images": 17, "rejected": 0, "leaked": 0, "duplicates": 4}
    assert count_duplicates(store, [f for f in result.files if f.name.startswith("index/val")]) == 0


@pytest.mark.parametrize("form", ["parquet", "tar", "folder"])
def test_a_run_goes_on_over_every_kind_of_broken_image(store: Store, images: Path, form: str) -> None:
    broken, odd = broken_images(), odd_images()
    mixed = [*[data for data, _ in broken.values()], *odd.values()]
    if form == "parquet":
        write_images(images / "unlabeled.parquet", mixed)
    elif form == "tar":
        write_tar(images / "unlabeled.tar", [(f"{n:03d}.jpg", data) for n, data in enumerate(mixed)])
    else:
        (images / "unlabeled").mkdir()
        for n, data in enumerate(mixed):
            (images / f"unlabeled/{n:03d}.jpg").write_bytes(data)
    name = {"parquet": "unlabeled.parquet", "tar": "unlabeled.tar", "folder": "unlabeled"}[form]
    with pytest.raises(UserError, match=rf"data\.unlabeled: {len(broken)} of {len(mixed)} images cannot be decoded"):
        run(store, images, unlabeled=name)
    manifest = committed(store, run(store, images, unlabeled=name, max_reject_fraction=0.7))
    rejects = [row for f in manifest.files_under("rejects/unlabeled/") for row in read_table(store, f).to_pylist()]
    assert len(rejects) == len(broken) >= 20
    for row, (kind, (_, reason)) in zip(rejects, broken.items(), strict=True):
        assert re.match(reason, row["reason"]), kind
    assert manifest.metrics["unlabeled"]["images"] == len(odd)
