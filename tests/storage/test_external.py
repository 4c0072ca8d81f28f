import hashlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.cache import node_cache
from storage.errors import StoreError, UserError
from storage.external import ExternalFolder, matches
from storage.objects import Store
from tests.fault_proxy import FaultProxy

ODD = "sub dir/größe 猫\nnew line [1].parquet"
NAMES = ("a.parquet", "b.parquet", "sub dir/c.parquet", "sub dir/deep/d.parquet", "sub dir/notes.txt", ODD)


@pytest.fixture
def upload(store: Store) -> Callable[[str, bytes], None]:
    """Puts a file of the user's into the folder that `folder` reads."""
    return lambda name, data: store._backend.replace(name, data)


@pytest.fixture
def folder(store: Store, upload: Callable[[str, bytes], None]) -> ExternalFolder:
    """Files of the user's, on disk and in a bucket."""
    for name in NAMES:
        upload(name, name.encode())
    return ExternalFolder(store.url, "data.root")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.parquet", ["a.parquet"]),
        ("*.parquet", ["a.parquet", "b.parquet"]),
        ("[ab].parquet", ["a.parquet", "b.parquet"]),
        ("?.parquet", ["a.parquet", "b.parquet"]),
        ("sub dir", ["sub dir/c.parquet", "sub dir/deep/d.parquet", ODD, "sub dir/notes.txt"]),
        ("./sub dir/", ["sub dir/c.parquet", "sub dir/deep/d.parquet", ODD, "sub dir/notes.txt"]),
        ("sub dir/*.parquet", ["sub dir/c.parquet", ODD]),
        ("**/d.parquet", ["sub dir/deep/d.parquet"]),
        ("**/*.txt", ["sub dir/notes.txt"]),
        (ODD, [ODD]),
        ("A.parquet", []),
        ("sub", []),
        ("", []),
    ],
)
def test_a_pattern_finds_the_same_files_on_disk_and_in_a_bucket(
    folder: ExternalFolder, pattern: str, names: list[str]
) -> None:
    assert [file.name for file in folder.find(pattern)] == names


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.parquet").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/crawl").symlink_to(tmp_path / "elsewhere")
    folder = ExternalFolder(str(tmp_path / "root"), "data.root")
    for pattern in ("crawl/*.parquet", "*/a.parquet", "**/*.parquet", "crawl"):
        assert [file.name for file in folder.find(pattern)] == ["crawl/a.parquet"]


def test_a_pattern_that_leaves_the_folder_is_refused(folder: ExternalFolder) -> None:
    with pytest.raises(UserError, match=r"leaves data\.root"):
        folder.find("../x/*.parquet")


def test_two_stars_are_any_number_of_steps() -> None:
    assert matches(["a", "b", "c"], ["**", "c"])
    assert matches(["c"], ["**", "c"])
    assert not matches(["a", "c", "d"], ["**", "c"])
    assert matches(["a", "b"], ["a", "**"])


def test_a_file_is_read_whole_and_by_ranges(folder: ExternalFolder) -> None:
    for file in folder.find("sub dir"):
        with folder.local(file) as path:
            assert path.read_bytes() == file.name.encode()
        with folder.ranges(file) as stream:
            stream.seek(-3, 2)
            assert stream.read() == file.name.encode()[-3:]


def test_a_footer_is_read_without_the_rest_of_the_file(s3: str, proxy: FaultProxy, tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": list(range(2_000_000))}), tmp_path / "x.parquet", compression="none")
    size = (tmp_path / "x.parquet").stat().st_size
    Store(s3).put_file(tmp_path / "x.parquet", "x.parquet")
    folder = ExternalFolder(s3, "data.root")
    (file,) = folder.find("x.parquet")
    proxy.requests.clear()
    with folder.ranges(file) as stream:
        assert pq.read_metadata(stream).num_rows == 2_000_000
    assert size > 10_000_000
    assert len(proxy.requests) <= 3, "each reads 64 KiB"


def test_a_copy_of_a_bucket_is_fetched_once(s3: str, proxy: FaultProxy) -> None:
    Store(s3)._backend.replace("a.parquet", b"content")
    folder = ExternalFolder(s3, "data.root")
    (file,) = folder.find("a.parquet")
    proxy.requests.clear()
    for _ in range(3):
        with folder.local(file) as path:
            assert path.read_bytes() == b"content"
    assert len(proxy.requests) == 1


def test_a_file_that_is_replaced_while_it_is_used_is_noticed(s3: str) -> None:
    backend = Store(s3)._backend
    backend.replace("a.parquet", b"first")
    folder = ExternalFolder(s3, "data.root")
    (file,) = folder.find("a.parquet")
    backend.replace("a.parquet", b"secnd")
    with pytest.raises(StoreError, match="replaced while it was read; run again"), folder.local(file):
        pass
    (again,) = folder.find("a.parquet")
    assert folder.fingerprint(again) != folder.fingerprint(file)
    with folder.local(again) as path:
        assert path.read_bytes() == b"secnd"


def test_a_byte_that_is_flipped_on_its_way_is_noticed(s3: str, proxy: FaultProxy) -> None:
    Store(s3)._backend.replace("a.parquet", b"content of a file")
    folder = ExternalFolder(s3, "data.root")
    (file,) = folder.find("a.parquet")
    fault = proxy.do("flip", method="GET", path="/a.parquet")
    with folder.local(file) as path:
        assert path.read_bytes() == b"content of a file"
    assert fault.done == 1


def test_a_tag_that_is_no_md5_is_accepted_when_the_same_bytes_come_twice(s3: str) -> None:
    data, md5 = b"encrypted at rest", hashlib.md5(b"something else").hexdigest()
    sha256 = node_cache().learn("name", len(data), lambda: iter([data]), md5)
    assert sha256 == hashlib.sha256(data).hexdigest()


def test_a_missing_folder_and_a_wrong_url_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: folder .*none does not exist"):
        ExternalFolder(str(tmp_path / "none"), "data.root").check()
    with pytest.raises(StoreError, match="gs"):
        ExternalFolder("gs://bucket", "data.root")
