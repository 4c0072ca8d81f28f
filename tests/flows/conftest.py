"""One finished tiny run, shared: tests that change the store work on a copy. A Prefect server for a test."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.prefect_servers import serving
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


@pytest.fixture
def prefect_server(tmp_path: Path) -> Iterator[str]:
    """A real Prefect server on a free port; its API's URL."""
    with serving(tmp_path) as url:
        yield url
