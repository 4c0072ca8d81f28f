from dataclasses import dataclass

import pytest

from storage.artifacts import Manifest
from storage.objects import Store
from tests.models.artifacts import make_artifacts
from tests.tasks.labeling import teacher


@dataclass(frozen=True)
class Subject:
    """A store with a data set of real digits and a model of its classes."""

    store: Store
    data: Manifest
    model: Manifest

    @property
    def inputs(self) -> dict[str, Manifest]:
        """As an evaluator takes them."""
        return {"data": self.data, "model": self.model}


@pytest.fixture(scope="session")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    artifacts = make_artifacts(tmp_path_factory.mktemp("evaluators"))
    return Subject(artifacts.store, artifacts.data, teacher(artifacts.store, 3))
