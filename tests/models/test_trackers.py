"""A training's numbers arrive in TensorBoard's files; trackers that are not installed are refused beforehand."""

import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from models.trackers import check_installed
from models.training import train
from models.worker import Stopped, Worker
from storage.errors import UserError
from tests.models.artifacts import Artifacts
from tests.models.training_runs import STEPS, DisturbedWorker, changed, content, history, run, spec


def events(folder: Path) -> list[Event]:
    """All events of a folder, the oldest file first (a TFRecord: length, its checksum, bytes, their checksum)."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(e.step, v.simple_value) for e in events(folder) for v in e.summary.value if v.tag == name]


def test_tensorboard_gets_what_the_history_has_and_the_rate(artifacts: Artifacts, tmp_path: Path) -> None:
    config = changed(record_steps=3)
    tracked = {"compute": {"trackers": ["tensorboard"]}, "log_folder": str(tmp_path / "logs")}
    result = run(artifacts, "tracked", config, **tracked)
    found = history(artifacts, result)
    for name in ("loss_labeled", "loss_unlabeled", "agreement", "learning_rate"):
        written = scalars(tmp_path / "logs", name)
        assert [step for step, _ in written] == [3, 6, 9, 12, 15, 18]
        assert [value for _, value in written] == pytest.approx(found[name])
    assert [step for step, _ in scalars(tmp_path / "logs", "val_top1")] == [6, 12, 18]
    assert all(value > 0 for _, value in scalars(tmp_path / "logs", "images_per_s"))
    assert content(result) == content(run(artifacts, "untracked", config)), "watching changes nothing"


def test_a_resumed_training_goes_on_in_the_same_folder_and_hides_what_was_lost(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    job = spec(artifacts, "tracked, stopped", compute={"trackers": ["tensorboard"]}, log_folder=str(tmp_path))
    with pytest.raises(Stopped):
        train(job, DisturbedWorker(7))
    train(job, Worker())
    assert {step for step, _ in scalars(tmp_path, "loss_labeled")} == set(range(1, STEPS + 1))
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [8], "TensorBoard drops older points from this step on"


def test_a_tracker_that_is_not_installed_is_refused_before_any_work() -> None:
    check_installed(["tensorboard"])
    with pytest.raises(UserError, match="compute.trackers names mlflow, but the package mlflow is not installed"):
        check_installed(["mlflow"])
