import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storage.artifacts import FileEntry, Manifest, artifact_folder, publish_file
from storage.cache import node_cache
from storage.errors import MissingObject, StoreError
from storage.objects import Store
from storage.shards import (
    INDEX_SCHEMA,
    OPEN_SHARDS,
    ROW_GROUP_ROWS,
    ShardReader,
    ShardSample,
    npy_bytes,
    read_index,
    read_table,
    shard_files,
    write_parquet,
    write_tar,
)
from tests.fault_proxy import FaultProxy
from tests.real_images import png
from tests.storage.conftest import overwrite

SAMPLES = [ShardSample(f"cats-{n:08d}", {"png": png(n), "cls": str(n % 3).encode()}) for n in range(5)]
READ_WITH_WEBDATASET = """
import hashlib, json, sys
import webdataset

samples = webdataset.WebDataset([sys.argv[1]], shardshuffle=False)
print(json.dumps([{k: v if k == "__key__" else hashlib.sha256(v).hexdigest()
                   for k, v in s.items() if k == "__key__" or not k.startswith("__")} for s in samples]))
"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def index_table(samples: list[ShardSample], places: list[dict[str, tuple[int, int]]]) -> pa.Table:
    rows = [
        {
            "key": sample.key,
            "offset": place["png"][0],
            "bytes": place["png"][1],
            "sha256": sha256(sample.members["png"]),
            "label": 1,
            "width": 12,
            "height": 10,
            "source": "cats.parquet:0",
        }
        for sample, place in zip(samples, places, strict=True)
    ]
    return pa.Table.from_pylist(rows, INDEX_SCHEMA)


def publish_split(store: Store, folder: Path, splits: dict[str, list[list[ShardSample]]]) -> Manifest:
    """A data set of these shards by split, with their indices."""
    place, files = artifact_folder("dataset", "k1"), []
    folder.mkdir(exist_ok=True)
    for split, shards in splits.items():
        for number, samples in enumerate(shards):
            places = write_tar(folder / "shard.tar", samples)
            write_parquet(folder / "index.parquet", index_table(samples, places))
            files.append(publish_file(store, place, f"shards/{split}/{number:05d}.tar", folder / "shard.tar"))
            files.append(publish_file(store, place, f"index/{split}/{number:05d}.parquet", folder / "index.parquet"))
    return Manifest(
        kind="dataset", key="k1", stage="prepare", stage_version=1, config={}, inputs={}, files=tuple(files)
    )


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    write_tar(first, SAMPLES)
    write_tar(second, iter(SAMPLES))
    assert first.read_bytes() == second.read_bytes()
    # what depends on machine, user and time must not be in there at all
    with tarfile.open(first) as tar:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
    assert facts == {(0, 0, 0, "", "", 0o444)}


@given(st.lists(st.lists(st.integers(0, 1100), min_size=1, max_size=3), max_size=6))
@example([[0], [511], [512], [513], [0, 512, 1024]])
def test_offsets_and_sizes_lead_to_each_members_bytes(sizes: list[list[int]]) -> None:
    rng = np.random.default_rng(0)
    samples = [
        ShardSample(f"s{n}", {f"e{place}": rng.bytes(size) for place, size in enumerate(own)})
        for n, own in enumerate(sizes)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        places = write_tar(path, samples)
        raw = path.read_bytes()
        with tarfile.open(path) as tar:
            by_tarfile = [(m.name, m.offset_data, m.size) for m in tar]
    for sample, place in zip(samples, places, strict=True):
        assert {e: raw[offset : offset + size] for e, (offset, size) in place.items()} == sample.members
    written = [(f"{s.key}.{e}", *at) for s, place in zip(samples, places, strict=True) for e, at in place.items()]
    assert written == by_tarfile


@pytest.mark.parametrize("key", ["k" * 150, "ключ-猫-" + "é" * 80])
def test_offsets_hold_for_names_that_need_a_block_of_their_own(tmp_path: Path, key: str) -> None:
    places = write_tar(tmp_path / "shard.tar", [ShardSample(key, {"png": png(1)}), SAMPLES[0]])
    raw = (tmp_path / "shard.tar").read_bytes()
    for place, data in zip(places, (png(1), SAMPLES[0].members["png"]), strict=True):
        offset, size = place["png"]
        assert raw[offset : offset + size] == data
    with tarfile.open(tmp_path / "shard.tar") as tar:
        assert tar.getnames()[0] == f"{key}.png"


def test_webdataset_reads_every_sample_with_all_its_members(tmp_path: Path) -> None:
    soft = npy_bytes(np.array([0.25, 0.75], np.float16))
    samples = [*SAMPLES, ShardSample("soft-00000001-c2", {"jpg": b"\xff\xd8", "npy": soft, "json": b"{}", "txt": b""})]
    write_tar(tmp_path / "shard.tar", samples)
    command = [sys.executable, "-c", READ_WITH_WEBDATASET, str(tmp_path / "shard.tar")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [{"__key__": s.key, **{e: sha256(data) for e, data in s.members.items()}} for s in samples]
    assert json.loads(done.stdout) == expected


def test_a_reader_returns_verified_bytes_and_notices_damage(disk: Store, tmp_path: Path) -> None:
    manifest = publish_split(disk, tmp_path, {"val": [SAMPLES]})
    shard = shard_files(manifest, "val")[0]
    row = read_index(disk, manifest, "val").to_pylist()[2]
    place = (row["offset"], row["bytes"], row["sha256"])
    reader = ShardReader(disk, [shard])
    assert reader.read(shard.path, *place) == SAMPLES[2].members["png"]
    reader.close()
    with disk.local_path(shard.path).open("r+b") as stream:
        stream.seek(row["offset"] + 20)
        stream.write(b"\x00\x01")
    with pytest.raises(StoreError, match=f"shard {shard.path} is damaged"):
        ShardReader(disk, [shard]).read(shard.path, *place)
    untouched = read_index(disk, manifest, "val").to_pylist()[3]
    assert ShardReader(disk, [shard]).read(shard.path, untouched["offset"], untouched["bytes"], untouched["sha256"])


@pytest.mark.parametrize("whole", [True, False])
def test_a_reader_names_a_shard_that_is_short_or_gone(store: Store, tmp_path: Path, whole: bool) -> None:
    manifest = publish_split(store, tmp_path, {"val": [SAMPLES]})
    shard = shard_files(manifest, "val")[0]
    last = read_index(store, manifest, "val").to_pylist()[-1]
    place = (shard.path, last["offset"], last["bytes"], last["sha256"])
    overwrite(store, shard.path, store.read_bytes(shard.path)[: last["offset"] + 5])
    with pytest.raises(StoreError, match=f"{shard.path} is damaged"):
        ShardReader(store, [shard], whole).read(*place)
    store.delete(shard.path)
    with pytest.raises(MissingObject, match=f"{shard.path} is missing"):
        ShardReader(store, [shard], whole).read(*place)


def test_a_reader_of_many_shards_keeps_few_files_open(disk: Store) -> None:
    data = {f"shards/{number}": f"{number:04d}".encode() for number in range(OPEN_SHARDS + 20)}
    shards = [FileEntry(name=path, path=path, bytes=4, sha256=sha256(found)) for path, found in data.items()]
    for path, found in data.items():
        disk.create(path, found)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = ShardReader(disk, shards)
    for _ in range(2):
        assert {entry.path: reader.read(entry.path, 0, 4, entry.sha256) for entry in shards} == data
    assert len(list(Path("/proc/self/fd").iterdir())) - before == OPEN_SHARDS
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_index_of_a_split_names_each_rows_shard_in_order(store: Store, tmp_path: Path) -> None:
    manifest = publish_split(store, tmp_path, {"val": [SAMPLES[:2], SAMPLES[2:]], "test": [SAMPLES[:1]]})
    table = read_index(store, manifest, "val")
    assert table.column_names == [*INDEX_SCHEMA.names, "shard"]
    assert table["key"].to_pylist() == [sample.key for sample in SAMPLES]
    first, second = (shard.path for shard in shard_files(manifest, "val"))
    assert table["shard"].to_pylist() == [first] * 2 + [second] * 3
    reader = ShardReader(store, shard_files(manifest, "val"))
    for row, sample in zip(table.to_pylist(), SAMPLES, strict=True):
        assert reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"]) == sample.members["png"]
    assert read_index(store, manifest, "val", ["label"]).column_names == ["label", "shard"]
    with pytest.raises(StoreError, match="dataset k1 has no split 'train'"):
        read_index(store, manifest, "train")


def test_a_damaged_index_is_named(store: Store, tmp_path: Path) -> None:
    manifest = publish_split(store, tmp_path, {"val": [SAMPLES]})
    entry = manifest.file("index/val/00000.parquet")
    overwrite(store, entry.path, b"PAR1 no more")
    with pytest.raises(StoreError, match=f"{entry.path} is damaged"):
        read_index(store, manifest, "val")


def test_a_file_that_is_no_parquet_is_named(store: Store) -> None:
    store.create("x.parquet", b"no table")
    entry = FileEntry(name="x", path="x.parquet", bytes=8, sha256=sha256(b"no table"))
    with pytest.raises(StoreError, match=r"x\.parquet cannot be read as Parquet"):
        read_table(store, entry)


def test_parquet_has_the_same_bytes_and_row_groups_whatever_the_chunks(tmp_path: Path) -> None:
    numbers = pa.array(np.arange(ROW_GROUP_ROWS + 5000))
    whole = pa.table({"n": numbers})
    chunked = pa.table({"n": pa.chunked_array([numbers[:7], numbers[7:66_000], numbers[66_000:]])})
    write_parquet(tmp_path / "whole.parquet", whole)
    write_parquet(tmp_path / "chunked.parquet", chunked)
    assert (tmp_path / "whole.parquet").read_bytes() == (tmp_path / "chunked.parquet").read_bytes()
    metadata = pq.ParquetFile(tmp_path / "whole.parquet").metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [ROW_GROUP_ROWS, 5000]


def test_npy_bytes_load_without_pickle() -> None:
    array = np.array([0.1, 0.9], np.float16)
    assert np.array_equal(np.load(io.BytesIO(npy_bytes(array)), allow_pickle=False), array)
    with pytest.raises(ValueError, match="allow_pickle"):
        npy_bytes(np.array([{}], dtype=object))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    gaps=st.lists(st.integers(0, 60), min_size=12, max_size=12),
    block=st.integers(1, 50),
    taken=st.sets(st.integers(0, 11)),
)
def test_a_stream_gives_any_samples_whatever_the_blocks(
    s3_store: Store, sizes: list[int], gaps: list[int], block: int, taken: set[int]
) -> None:
    """Samples across blocks, gaps longer than a block, empty samples."""
    data, places = b"", []
    for size, gap in zip(sizes, gaps, strict=False):
        data += b"-" * gap
        places.append((len(data), size))
        data += bytes((len(data) + n) % 251 for n in range(size))
    path = f"shards/{sha256(data)[:16]}.tar"
    s3_store.create(path, data)
    shard = FileEntry(name=path, path=path, bytes=len(data), sha256=sha256(data))
    wanted = [
        (offset, size, sha256(data[offset : offset + size])) for n, (offset, size) in enumerate(places) if n in taken
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.s3.BLOCK_BYTES", block)
        found = list(ShardReader(s3_store, [shard], whole=False).stream(path, wanted))
    assert found == [data[offset : offset + size] for offset, size, _ in wanted]


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_names_a_damaged_shard(store: Store, tmp_path: Path, whole: bool) -> None:
    manifest = publish_split(store, tmp_path, {"val": [SAMPLES]})
    shard = shard_files(manifest, "val")[0]
    rows = read_index(store, manifest, "val").to_pylist()
    places = [(row["offset"], row["bytes"], row["sha256"]) for row in rows]
    samples = [sample.members["png"] for sample in SAMPLES]
    assert list(ShardReader(store, [shard], whole).stream(shard.path, places)) == samples
    data = bytearray(store.read_bytes(shard.path))
    data[rows[3]["offset"] + 9] ^= 1
    overwrite(store, shard.path, bytes(data))
    node_cache().drop(shard.sha256)
    stream = ShardReader(store, [shard], whole).stream(shard.path, places)
    with pytest.raises(StoreError, match=f"{shard.path} is damaged"):
        list(stream)


def test_a_byte_that_is_flipped_in_a_stream_is_read_again(
    s3_store: Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = publish_split(s3_store, tmp_path, {"val": [SAMPLES]})
    shard = shard_files(manifest, "val")[0]
    rows = read_index(s3_store, manifest, "val").to_pylist()
    monkeypatch.setattr("tests.fault_proxy.FLIPPED", rows[0]["offset"] + 5)
    fault = proxy.do("flip", method="GET", path=".tar")
    places = [(row["offset"], row["bytes"], row["sha256"]) for row in rows]
    found = list(ShardReader(Store(s3_store.url), [shard], whole=False).stream(shard.path, places))
    assert fault.done == 1
    assert found == [sample.members["png"] for sample in SAMPLES]


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", ".."])
def test_a_key_that_leaves_the_shard_is_never_written(tmp_path: Path, key: str) -> None:
    with pytest.raises(StoreError, match="leaves the shard"):
        write_tar(tmp_path / "shard.tar", [ShardSample(key, {"png": png(1)})])


def test_a_member_named_with_dots_is_read_by_its_place_and_unpacked_nowhere(store: Store, tmp_path: Path) -> None:
    """A tar that others wrote: names of its members are never used as paths."""
    names, path = ["../../escaped.png", "/tmp/escaped.png", "a\nb ü 猫.png"], tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(png(1))
            tar.addfile(info, io.BytesIO(png(1)))
    with tarfile.open(path) as tar:
        places = [(member.offset_data, member.size, sha256(png(1))) for member in tar]
    shard = FileEntry(name="evil.tar", path="evil.tar", bytes=path.stat().st_size, sha256=sha256(path.read_bytes()))
    before = set(tmp_path.rglob("*.png"))
    store.put_file(path, "evil.tar")
    for whole in (True, False):
        assert list(ShardReader(store, [shard], whole).stream("evil.tar", places)) == [png(1)] * 3
    assert set(tmp_path.rglob("*.png")) == before
    assert not Path("/tmp/escaped.png").exists()
