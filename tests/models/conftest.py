from pathlib import Path

import pytest

from tests.models.artifacts import Artifacts, make_artifacts


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A data set, labels and a selection, made once; tests that damage files copy the store first."""
    return make_artifacts(Path(tmp_path_factory.mktemp("artifacts")))
