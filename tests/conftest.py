from pathlib import Path

import pytest
from hypothesis import settings

from storage.objects import Store

settings.register_profile("project", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("project")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of its own for each test, in a folder that does not exist yet."""
    return Store(str(tmp_path / "store"))
