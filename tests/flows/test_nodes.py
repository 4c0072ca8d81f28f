"""Trainings on two machines without a scheduler: `nst join`. Two \"nodes\" of this machine that share only the bucket."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.launch import free_port
from storage.objects import Store
from storage.verify import verify_all
from tests.flows.runs import command, contents, nst, open_checkpoints, read_until, run, start, wait_for_output

REPLICAS = "train.replicas=2"


def on_two_nodes() -> tuple[str, tuple[str, ...]]:
    """Where they meet, and the settings."""
    endpoint = f"127.0.0.1:{free_port('127.0.0.1')}"
    return endpoint, (REPLICAS, "compute.ranks=2", "compute.nodes=2", f"compute.rdzv_endpoint={endpoint}")


def join(endpoint: str, cache: Path, *options: str) -> "subprocess.Popen[str]":
    return start([sys.executable, "-m", "flows.cli", "join", endpoint, *options], NST_CACHE_DIR=str(cache))


def stop(node: "subprocess.Popen[str]") -> str:
    """As Ctrl-C does (which is ignored below a shell's `&`); its output."""
    node.send_signal(signal.SIGTERM)
    output = node.communicate(timeout=60)[0]
    assert node.returncode == 143, output
    return output


def test_two_machines_that_share_only_the_bucket_train_as_one_does(s3: str, tmp_path: Path) -> None:
    """Bit for bit: two replicas on two nodes as on one rank. The other machine takes part in every training."""
    endpoint, settings = on_two_nodes()
    other = join(endpoint, tmp_path / "other")
    said = run(command(s3, *settings), NST_CACHE_DIR=str(tmp_path / "first"))
    assert f"run `nst join {endpoint}` there" in said
    joined = stop(other)
    assert joined.count("takes part in models.training:train of s3://") == 2, joined
    assert joined.count("done") == 2, joined
    run(command(tmp_path / "alone", REPLICAS))
    assert contents(s3) == contents(tmp_path / "alone")
    assert verify_all(Store(s3)).problems == []


@pytest.mark.soak
def test_a_training_whose_other_machine_is_lost_stops_and_goes_on_with_a_new_one(s3: str, tmp_path: Path) -> None:
    endpoint, settings = on_two_nodes()
    line = command(s3, *settings, "teacher.epochs=120")
    lost = join(endpoint, tmp_path / "lost")
    first = start(line, NST_CACHE_DIR=str(tmp_path / "first"))
    family = wait_for_output(lost, "takes part in")
    read_until(first, "0/teacher: ")
    for process in family:
        process.kill()
    lost.kill()
    lost.communicate()
    output = first.communicate(timeout=100)[0]
    assert first.returncode == 1, output
    assert "models.training:train" in output

    other = join(endpoint, tmp_path / "other")
    run(line, NST_CACHE_DIR=str(tmp_path / "first"))
    stop(other)
    run(command(tmp_path / "alone", REPLICAS, "teacher.epochs=120"))
    assert contents(s3) == contents(tmp_path / "alone")


@pytest.mark.soak
@pytest.mark.parametrize("stopped", ["first", "other"])
def test_a_training_of_which_a_machine_is_stopped_writes_a_checkpoint(s3: str, tmp_path: Path, stopped: str) -> None:
    """Where it was the first, the other one waits for the next training."""
    endpoint, settings = on_two_nodes()
    rare = ("compute.checkpoint_steps=1000000", "compute.checkpoint_seconds=1000000", "teacher.epochs=4000")
    other = join(endpoint, tmp_path / "other")
    first = start(command(s3, *settings, *rare), NST_CACHE_DIR=str(tmp_path / "first"))
    read_until(first, "0/teacher: ")
    if stopped == "first":
        first.send_signal(signal.SIGTERM)
    else:
        stop(other)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == (143 if stopped == "first" else 1), output
    assert ("was asked to stop" in output) == (stopped == "other")
    assert open_checkpoints(s3) == 1
    if stopped == "first":
        read_until(other, "waits for a training")  # the first time at its start, then again
        stop(other)


def test_a_rank_that_fails_on_the_other_machine_is_named_on_the_first(s3: str, tmp_path: Path) -> None:
    """The other machine cannot read the bucket: its credentials are wrong."""
    endpoint, settings = on_two_nodes()
    line = [sys.executable, "-m", "flows.cli", "join", endpoint, "--once"]
    other = start(line, NST_CACHE_DIR=str(tmp_path / "other"), AWS_SECRET_ACCESS_KEY="wrong")
    first = start(command(s3, *settings), NST_CACHE_DIR=str(tmp_path / "first"))
    output = first.communicate(timeout=200)[0]
    joined = other.communicate(timeout=60)[0]
    assert first.returncode in (1, 2), output
    assert "credentials" in output.lower() or "denied" in output.lower() or "signature" in output.lower(), output
    assert other.returncode == 1, joined


def test_what_cannot_work_is_said_before_anything_starts(tmp_path: Path) -> None:
    assert "'nowhere' is not HOST:PORT" in nst("join", "nowhere", cwd=tmp_path, code=2)
    base = ("plan", "digits", REPLICAS, "compute.ranks=2", "compute.nodes=2")
    assert "needs rdzv_endpoint=HOST:PORT" in nst(*base, cwd=tmp_path, code=2)
    bad = nst(*base, "compute.rdzv_endpoint=host", cwd=tmp_path, code=2)
    assert "'host' is not HOST:PORT" in bad
    ranks = nst(*base[:-1], "compute.nodes=4", "compute.rdzv_endpoint=h:1", cwd=tmp_path, code=2)
    assert "nodes=4 does not divide ranks=2" in ranks
    folder = ("run", "digits", "--prefect", "off", REPLICAS, "compute.ranks=2", "compute.nodes=2")
    said = nst(*folder, "compute.rdzv_endpoint=far.example:29400", cwd=tmp_path, code=2)
    assert "is a folder, and compute.nodes=2 machines train together" in said
    assert not (tmp_path / os.environ.get("NST_STORE", "nst-store") / "artifacts").exists()
