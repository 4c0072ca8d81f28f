import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from deployments.seaweedfs import BUCKET, S3Server, s3_server
from storage.objects import Store
from tests.fault_proxy import FaultProxy, fault_proxy

settings.register_profile("project", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("project")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of its own for each test, in a folder that does not exist yet."""
    return Store(str(tmp_path / "store"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size (`200k`) of its own and gives its folder; a second call changes the size."""
    place = tmp_path / "small-disk"

    def mount(size: str) -> Path:
        options = f"remount,size={size}" if place.exists() else f"size={size}"
        place.mkdir(exist_ok=True)
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        mounted = subprocess.run(line, capture_output=True, text=True)
        if mounted.returncode != 0:
            pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with a bucket `nst`, for all tests."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_process: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty store in the bucket; this process and its children find the server, and a cache of their own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NST_CACHE_DIR", str(tmp_path / "node-cache"))
    return f"s3://{BUCKET}/{tmp_path.parent.name}-{tmp_path.name}"


@pytest.fixture
def s3_store(s3: str) -> Store:
    """An empty store in the bucket."""
    return Store(s3)


@pytest.fixture(params=["file", "s3"])
def any_store(request: pytest.FixtureRequest) -> Store:
    """An empty store of each kind."""
    name = "store" if request.param == "file" else "s3_store"
    found: Store = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="session")
def proxy_process(s3_process: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the S3 server."""
    with fault_proxy(s3_process.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(proxy_process: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The proxy without any rule; stores made in this test go through it."""
    proxy_process.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy_process.endpoint)
    yield proxy_process
    proxy_process.clear()
