"""Tests of this folder run on both kinds of store, unless they ask for `disk`."""

from pathlib import Path

import pytest

from storage.objects import Store


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind, in turn."""
    return Store(str(tmp_path / "store")) if request.param == "file" else request.getfixturevalue("s3_store")


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    """An empty store on disk, in a folder that does not exist yet."""
    return Store(str(tmp_path / "store"))


def overwrite(store: Store, path: str, data: bytes) -> None:
    """Alter an object, as no code of ours does."""
    store._backend.replace(path, data)
