"""How a label stage computes: what an earlier attempt settled, and when that binds the next one."""

from typing import Any

import pytest
import torch

from models.compute import ComputeConfig
from models.configs import LabelConfig
from models.numerics import asked_otherwise, chosen_numerics
from storage.artifacts import Manifest, agree_numerics, artifact_folder
from storage.errors import UserError
from storage.keys import digest
from tasks.contract import StageContext, StageResult
from tasks.label import label
from tests.models.artifacts import Artifacts, make_artifacts
from tests.tasks.labeling import BATCH, PLAIN, InThisProcess, teacher


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return make_artifacts(tmp_path_factory.mktemp("label"))


@pytest.fixture
def model(artifacts: Artifacts, request: pytest.FixtureRequest) -> Manifest:
    """A teacher of each test's own, so that it finds no parts of another one."""
    return teacher(artifacts.store, int(digest(request.node.name)[:6], 16))


class KilledAfterFirst(InThisProcess):
    """Is gone once one part is made."""

    def map(self, function: str, specs: Any, on_progress: Any) -> list[dict[str, Any]]:
        if not function.endswith("label_shards"):
            return super().map(function, specs, on_progress)
        super().map(function, [{**specs[0], "parts": specs[0]["parts"][:1]}], on_progress)
        raise InterruptedError("killed")


def attempt(artifacts: Artifacts, model: Manifest, engine: Any = InThisProcess, **compute: Any) -> StageResult:
    """Label with these settings: an attempt at the same artifact each time."""
    settings = ComputeConfig(processes=1, **{**PLAIN, **compute})
    context = StageContext(artifacts.store, digest(["labels of", model.key]), engine(settings), settings)
    return label(context, LabelConfig(), {"data": artifacts.data, "model": model})


def test_after_a_compilation_that_failed_its_own_remedy_works(
    artifacts: Artifacts, model: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(UserError, match="set compute.compile=never"):
        attempt(artifacts, model, compile="always")
    with pytest.raises(UserError, match="set compute.compile=never"):
        attempt(artifacts, model, compile="auto")  # asks for nothing else than what was agreed on
    assert attempt(artifacts, model, compile="never").facts["numerics"]["compile"] is False


def test_after_a_batch_that_was_too_large_a_smaller_one_is_used(artifacts: Artifacts, model: Manifest) -> None:
    class OutOfMemory(InThisProcess):
        def map(self, function: str, specs: Any, on_progress: Any) -> list[dict[str, Any]]:
            raise MemoryError

    with pytest.raises(MemoryError):
        attempt(artifacts, model, OutOfMemory, inference_batch=0)
    assert attempt(artifacts, model, inference_batch=8).facts["numerics"]["batch"] == 8


def test_a_run_begun_on_a_gpu_that_made_nothing_goes_on_without_one(
    artifacts: Artifacts, model: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    key = digest(["labels of", model.key])
    agree_numerics(artifacts.store, "labels", key, chosen_numerics(ComputeConfig(device="cuda")))
    found = attempt(artifacts, model, inference_batch=0).facts["numerics"]
    assert (found["device"], found["batch"]) == ("cpu", 16)
    assert artifacts.store.read_record(f"{artifact_folder('labels', key)}/numerics.json") == found


def test_parts_made_in_another_way_are_neither_mixed_nor_thrown_away(artifacts: Artifacts, model: Manifest) -> None:
    with pytest.raises(InterruptedError):
        attempt(artifacts, model, KilledAfterFirst, dtype="bfloat16")
    with pytest.raises(UserError, match=r"^1 of 3 parts .* made with compute.dtype=bfloat16.*--rerun label$"):
        attempt(artifacts, model, dtype="float32")
    with pytest.raises(UserError, match=r"1 of 3 parts .* made with compute.inference_batch=16,"):
        attempt(artifacts, model, dtype="auto", inference_batch=8)
    finished = attempt(artifacts, model, dtype="auto")
    assert finished.facts["numerics"]["dtype"] == "bfloat16"
    assert attempt(artifacts, model, dtype="float32").files == finished.files, "nothing was left to be made"


def test_the_dtype_hangs_on_the_whole_job_not_on_processes_or_parts_that_exist(
    artifacts: Artifacts, model: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """72 images pay for bfloat16 here; a share of 9, or of none, would not."""
    known = {"macs": 10**9, "bfloat16": True, "compiler": False}
    monkeypatch.setattr("models.inference.survey", lambda *_: known)
    cost = {("float32", False): (0.0, 1.0), ("bfloat16", False): (10.0, 0.0)}
    monkeypatch.setattr("models.numerics.COST", cost)
    attempt(artifacts, model, dtype="float32")  # its parts are there, but it is another artifact
    for processes in (1, 8):
        settings = ComputeConfig(processes=processes, inference_batch=BATCH, device="cpu")
        context = StageContext(artifacts.store, digest([model.key, processes]), InThisProcess(settings), settings)
        found = label(context, LabelConfig(), {"data": artifacts.data, "model": model})
        assert found.facts["numerics"]["dtype"] == "bfloat16"


def test_what_is_left_to_choice_allows_what_was_agreed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed = chosen_numerics(ComputeConfig(device="cuda", dtype="bfloat16", compile="always"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert asked_otherwise(ComputeConfig(device="cuda"), agreed) == {}
    assert asked_otherwise(ComputeConfig(), agreed) == {"compute.device": "cuda"}
    strict = ComputeConfig(device="cpu", dtype="float32", compile="never", inference_batch=BATCH)
    then = {"device": "cuda", "dtype": "bfloat16", "compile": "always", "inference_batch": 256}
    assert asked_otherwise(strict, agreed) == {f"compute.{name}": value for name, value in then.items()}
