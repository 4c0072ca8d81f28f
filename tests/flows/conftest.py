"""One finished tiny run, shared: tests that change the store work on a copy."""

import shutil
from pathlib import Path

import pytest

from tests.flows.runs import command, run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed run. Not to be changed."""
    store = tmp_path_factory.mktemp("finished") / "store"
    run(command(store))
    return store


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run's store."""
    return Path(shutil.copytree(finished, tmp_path / "store"))
