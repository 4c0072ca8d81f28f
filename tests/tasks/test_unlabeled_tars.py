"""Tars as a source: registered where they lie or copied, torn, odd and hostile ones."""

import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.artifacts import check_files
from storage.errors import DamagedObject, StoreError, UserError
from storage.objects import Store
from storage.shards import ShardReader, read_index, read_table, shard_files
from storage.verify import verify_artifact
from tests.real_images import encoded, jpeg, picture, png, write_splits
from tests.tasks.unlabeled_runs import committed, run, write_tar


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_splits(tmp_path / "images")


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """As img2dataset writes them: picture, caption and facts, with keys that begin again in each tar."""
    members = []
    for n in range(count):
        facts = {"caption": f"{n}", "url": "u", "width": 12, "height": 10}
        members += [
            (f"{n:09d}.jpg", jpeg(first + n)),
            (f"{n:09d}.txt", b"a caption"),
            (f"{n:09d}.json", json.dumps(facts).encode()),
        ]
    return members  # fmt: skip


@pytest.fixture
def crawl(images: Path) -> Path:
    """An img2dataset folder beside the labeled files: tars, a Parquet of facts beside each, and its statistics."""
    for number in range(2):
        write_tar(images / f"crawl/{number:05d}.tar", samples(100 * number, 6))
        pq.write_table(pa.table({"url": ["u"] * 6, "key": ["k"] * 6}), images / f"crawl/{number:05d}.parquet")
        (images / f"crawl/{number:05d}_stats.json").write_text("{}")
    return images


def test_img2datasets_tars_are_registered_where_they_lie(store: Store, crawl: Path) -> None:
    manifest = committed(store, run(store, crawl, unlabeled="crawl"))
    rows = read_index(store, manifest, "unlabeled").to_pylist()
    assert [row["key"] for row in rows] == [f"crawl_0000{t}-{digest}-{n:08d}" for t, digest in enumerate(prefixes(rows)) for n in range(6)]  # fmt: skip
    assert rows[7]["source"] == "crawl/00001.tar:000000001.jpg"
    assert [shard.path for shard in shard_files(manifest, "unlabeled")] == [
        (crawl / f"crawl/{n:05d}.tar").as_uri() for n in range(2)
    ]
    reader = ShardReader(store, shard_files(manifest, "unlabeled"))
    for number, row in enumerate(rows):
        data = reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"])
        assert data == jpeg(100 * (number // 6) + number % 6)
    places = [(row["offset"], row["bytes"], row["sha256"]) for row in rows[:6]]
    assert list(reader.stream(rows[0]["shard"], places)) == [jpeg(n) for n in range(6)]
    check_files(store, manifest.files)
    assert verify_artifact(store, manifest).problems == []


def test_the_kind_of_a_file_does_not_depend_on_the_case_of_its_name(store: Store, images: Path) -> None:
    (images / "unlabeled.parquet").rename(images / "UNLABELED.PARQUET")
    write_tar(images / "CRAWL.TAR", samples(0, 3))
    parquet = run(store, images, unlabeled="UNLABELED.PARQUET")
    assert parquet.metrics["unlabeled"]["images"] == 30
    tar = run(store, images, unlabeled="CRAWL.TAR")
    assert [f.path for f in tar.files if f.name.startswith("shards/unlabeled")] == [(images / "CRAWL.TAR").as_uri()]


def prefixes(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["key"].split("-")[-2] for row in rows))


def test_not_one_image_byte_of_a_registered_tar_is_copied(store: Store, crawl: Path) -> None:
    run(store, crawl, unlabeled="crawl")
    stored = b"".join(store.read_bytes(path) for path in store.paths("parts") if path.endswith(".tar"))
    assert jpeg(3) not in stored
    copied = Store(store.url + "-copied")
    run(copied, crawl, unlabeled="crawl", in_place=False)
    stored = b"".join(copied.read_bytes(path) for path in copied.paths("parts") if path.endswith(".tar"))
    assert jpeg(3) in stored


def test_copied_tars_are_cut_into_shards_of_the_size_asked_for(store: Store, images: Path) -> None:
    write_tar(images / "one.tar", samples(0, 24))
    write_tar(images / "two.tar", samples(50, 3))
    members = [((f"{n}.png", png(n)), (f"{n}.cls", b"1")) for n in range(13)]
    write_tar(images / "val.tar", [member for sample in members for member in sample])
    settings: dict[str, Any] = {"unlabeled": "*o*.tar", "val": "val.tar", "in_place": False}
    manifest = committed(store, run(store, images, **settings))
    assert [shard.rows for shard in shard_files(manifest, "unlabeled")] == [10, 10, 4, 3]
    assert [shard.rows for shard in shard_files(manifest, "val")] == [10, 3]
    rows = read_index(store, manifest, "unlabeled").to_pylist()
    assert len({row["key"] for row in rows}) == 27
    reader = ShardReader(store, shard_files(manifest, "unlabeled"))
    read = [reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"]) for row in rows]
    assert read == [jpeg(n) for n in (*range(24), *range(50, 53))]
    by_bytes = run(Store(store.url + "-bytes"), images, shard_bytes=2 * len(jpeg(0)), **settings)
    assert {f.rows for f in by_bytes.files if f.name.startswith("shards/unlabeled/")} <= {1, 2, 3}
    parts = set(store.paths("parts/ingest"))
    assert run(store, images, shard_images=7, **settings).metrics["unlabeled"]["images"] == 27
    assert set(store.paths("parts/ingest")) > parts, "another size is another part"


def test_memory_does_not_grow_with_the_images_of_a_tar(store: Store, images: Path) -> None:
    peaks = []
    for count in (1200, 3600):
        path = write_tar(images / f"{count}.tar", [(f"{n}.png", png(n % 50)) for n in range(count)])
        tracemalloc.start()
        run(store, images, unlabeled=path.name, leaks={"enabled": False})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # It was 3,200. What is left: the larger tar fills buffers of a MiB that the smaller one does not.
    growth = (peaks[1] - peaks[0]) / 2400
    assert growth < 1500, f"bytes an image: {peaks}"


def test_a_registered_tar_that_changed_or_vanished_is_named(store: Store, crawl: Path) -> None:
    manifest = committed(store, run(store, crawl, unlabeled="crawl"))
    (row, *_) = read_index(store, manifest, "unlabeled").to_pylist()
    tar = crawl / "crawl/00000.tar"
    data = bytearray(tar.read_bytes())
    data[row["offset"] + 5] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamagedObject, match=r"crawl/00000\.tar is damaged"):
        ShardReader(store, shard_files(manifest, "unlabeled")).read(
            row["shard"], row["offset"], row["bytes"], row["sha256"]
        )
    (problem,) = verify_artifact(store, manifest).problems
    assert problem.path == tar.as_uri()
    tar.unlink()
    with pytest.raises(StoreError, match=r"crawl/00000\.tar is missing"):
        check_files(store, manifest.files)
    with pytest.raises(
        StoreError, match=r"crawl/00000\.tar is missing; it was registered in place: put it back, or set"
    ):
        ShardReader(store, shard_files(manifest, "unlabeled")).read(
            row["shard"], row["offset"], row["bytes"], row["sha256"]
        )


def test_tars_that_moved_are_registered_anew_without_being_read(store: Store, crawl: Path, tmp_path: Path) -> None:
    before = run(store, crawl, unlabeled="crawl")
    parts = store.paths("parts/ingest")
    moved = crawl.rename(tmp_path / "moved")
    after = run(store, moved, unlabeled="crawl")
    assert store.paths("parts/ingest") == parts, "nothing was read again"
    here = [file.path for file in after.files if file.name.startswith("shards/unlabeled")]
    assert here == [(moved / f"crawl/{n:05d}.tar").as_uri() for n in range(2)]
    assert [(f.name, f.sha256) for f in after.files] == [(f.name, f.sha256) for f in before.files]


def test_tars_in_a_bucket_are_registered_by_a_store_on_disk(s3: str, tmp_path: Path, crawl: Path) -> None:
    bucket = Store(f"{s3}/images")
    for path in crawl.rglob("*.*"):
        bucket._backend.replace(path.relative_to(crawl).as_posix(), path.read_bytes())
    here = Store(str(tmp_path / "store"))
    manifest = committed(here, run(here, bucket.url, unlabeled="crawl/*.tar"))
    assert [shard.path for shard in shard_files(manifest, "unlabeled")] == [f"{bucket.url}/crawl/0000{n}.tar" for n in range(2)]  # fmt: skip
    rows = read_index(here, manifest, "unlabeled").to_pylist()
    for whole in (True, False):
        reader = ShardReader(here, shard_files(manifest, "unlabeled"), whole)
        assert reader.read(*[rows[8][n] for n in ("shard", "offset", "bytes", "sha256")]) == jpeg(102)
    assert verify_artifact(here, manifest).problems == []


def test_hostile_and_odd_members_of_a_tar_do_no_harm(store: Store, images: Path, tmp_path: Path) -> None:
    link, hard = tarfile.TarInfo("link.jpg"), tarfile.TarInfo("hard.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "twice.jpg"
    path = write_tar(
        images / "odd.tar",
        [
            ("../../escape.jpg", jpeg(1)),
            ("/absolute.png", png(2)),
            ("dir.with.dots/a.seg.png", png(3)),
            ("dir.with.dots/b.JPG", jpeg(4)),
            ("no-picture.txt", b"text"),
            (".hidden.jpg", jpeg(5)),
            ("twice.jpg", jpeg(6)),
            ("twice.png", png(7)),
            ("x" * 300 + ".png", png(8)),
        ],
    )
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
        tar.addfile(hard)
    before = sorted(tmp_path.rglob("*"))
    manifest = committed(store, run(store, images, unlabeled="odd.tar", max_reject_fraction=0.5))
    rows = read_index(store, manifest, "unlabeled").to_pylist()
    assert [row["source"].rpartition(":")[2][:30] for row in rows] == [
        "../../escape.jpg", "/absolute.png", "dir.with.dots/b.JPG", "twice.jpg", "x" * 30,
    ]  # fmt: skip
    assert all(set(row["key"]).isdisjoint("./ ") for row in rows)
    rejects = read_table(store, manifest.file("rejects/unlabeled/00000.parquet")).to_pylist()
    reasons = [r["reason"] for r in rejects]
    assert reasons[:2] == ["no image among its members"] * 2
    assert [reason.partition(",")[0] for reason in reasons[2:]] == ["a link to '/etc/passwd'", "a link to 'twice.jpg'"]
    assert {p for p in tmp_path.rglob("*") if "store" not in p.parts} == {p for p in before if "store" not in p.parts}


TORN = {
    "a damaged header": lambda tar, at: bytes([*tar[: at + 20], tar[at + 20] ^ 1, *tar[at + 21 :]]),
    "4 kB of zeros": lambda tar, at: tar[:at] + bytes(4096) + tar[at + 4096 :],
    "cut inside a header": lambda tar, at: tar[: at + 100],
    "cut between two members": lambda tar, at: tar[:at],
    "cut inside an image": lambda tar, at: tar[: at + 600],
    "two tars glued together": lambda tar, at: tar[:at] + bytes(1024) + tar[at:],
}


@pytest.mark.parametrize("damage", TORN)
def test_what_is_whole_in_a_torn_tar_is_used_and_the_tear_is_told(store: Store, images: Path, damage: str) -> None:
    path = write_tar(images / "torn.tar", [(f"{n:03d}.png", encoded(picture(n, 60, 60))) for n in range(100)])
    with tarfile.open(path) as tar:
        header = tar.getmembers()[90].offset
    path.write_bytes(TORN[damage](path.read_bytes(), header))
    manifest = committed(store, run(store, images, unlabeled="torn.tar", max_reject_fraction=0.12))
    (reject,) = read_table(store, manifest.file("rejects/unlabeled/00000.parquet")).to_pylist()
    assert reject["reason"].startswith(f"the tar is torn at byte {header if 'image' not in damage else ''}"[:26])
    counts = manifest.metrics["unlabeled"]
    assert counts["images"] == 90
    if damage.startswith("cut"):
        assert counts["rejected"] == 1
    else:
        assert 9 <= counts["rejected"] <= 11, "a tear counts as the images that it lost"
        with pytest.raises(UserError, match=rf"{counts['rejected']} of .* images .*torn at byte"):
            run(store, images, unlabeled="torn.tar")


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_avif_files_are_images(store: Store, images: Path, form: str) -> None:
    data = [encoded(picture(n), "AVIF") for n in range(3)]
    if form == "tar":
        write_tar(images / "crawl.tar", [(f"{n}.avif", image) for n, image in enumerate(data)])
    else:
        (images / "crawl").mkdir()
        for n, image in enumerate(data):
            (images / f"crawl/{n}.avif").write_bytes(image)
    counts = run(store, images, unlabeled="crawl.tar" if form == "tar" else "crawl").metrics["unlabeled"]
    assert (counts["images"], counts["rejected"]) == (3, 0)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_whole_tar_of_any_form_loses_nothing(store: Store, images: Path, form: int) -> None:
    with tarfile.open(images / "whole.tar", "w", format=form) as tar:
        for n in range(5):
            info = tarfile.TarInfo(f"{'größe' if form != tarfile.USTAR_FORMAT else 'size'}/{'x' * 90}{n}.png")
            info.size = len(png(n))
            tar.addfile(info, io.BytesIO(png(n)))
    counts = run(store, images, unlabeled="whole.tar").metrics["unlabeled"]
    assert (counts["images"], counts["rejected"]) == (5, 0)


def test_what_is_no_tar_or_a_compressed_one_is_an_error_that_names_it(store: Store, images: Path) -> None:
    (images / "text.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"text\.tar is no tar that can be read"):
        run(store, images, unlabeled="text.tar")
    (images / "packed").mkdir()
    with tarfile.open(images / "packed/a.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"packed/a\.tar\.gz is a compressed tar.*unpack it"):
        run(store, images, unlabeled="packed")


def test_labeled_tars_carry_their_labels(store: Store, images: Path) -> None:
    members = [[(f"{n:03d}.png", png(n)), (f"{n:03d}.cls", str(n % 3).encode())] for n in range(40)]
    members[7][1] = ("007.cls", b"cat")
    members[8].pop()
    members[9][1] = ("009.cls", str(2**31).encode())
    write_tar(images / "labeled.tar", [member for sample in members for member in sample])
    manifest = committed(store, run(store, images, labeled="labeled.tar", shard_images=15, max_reject_fraction=0.1))
    rows = read_index(store, manifest, "labeled").to_pylist()
    assert {int(row["key"][-8:]): row["label"] for row in rows} == {n: n % 3 for n in range(40) if n not in (7, 8, 9)}
    assert [shard.rows for shard in shard_files(manifest, "labeled")] == [15, 15, 7]
    rejects = read_table(store, manifest.file("rejects/labeled/00000.parquet")).to_pylist()
    assert [row["reason"] for row in rejects] == [
        "its label is b'cat', not a number",
        "no label (.cls)",
        "its label is 2147483648, more than 2,147,483,647",
    ]
    with pytest.raises(UserError, match=r"an image has label 2, outside the 2 classes 0\.\.1"):
        run(store, images, labeled="labeled.tar", class_names=("a", "b"), max_reject_fraction=0.1)
