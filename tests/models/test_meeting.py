"""What machines say to each other at a meeting, through torch's own store."""

import json
from dataclasses import asdict

import pytest

from models import meeting
from models.launch import free_port
from models.meeting import TELL, Meeting, arrive, tell, told
from storage.errors import UserError

HOST = "127.0.0.1"


def job_at(endpoint: Meeting) -> meeting.Job:
    return {"function": "f", "spec": {}, "world": 2, "threads": 1, "meeting": asdict(endpoint)}


@pytest.fixture
def endpoint() -> str:
    return f"{HOST}:{free_port(HOST)}"


def test_a_machine_with_other_versions_is_refused_before_it_takes_a_place(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, arguments, store = arrive(job_at(Meeting.at(endpoint, 2)))
    assert "--node-rank=0" in arguments
    own = job["packages"]
    monkeypatch.setattr(meeting, "package_versions", lambda names: {**own, "torch": "1.0"})
    with pytest.raises(UserError, match=rf"this machine has torch 1.0 \(there {own['torch']}"):
        arrive(job_at(Meeting.at(endpoint, first=False)))
    assert store.add(f"{job['id']}/joined", 0) == 0


def test_a_failure_elsewhere_reaches_the_first_machine_and_one_with_nobody_to_tell_is_quiet(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _, store = arrive(job_at(Meeting.at(endpoint, 2)))
    record = {"error": {"rank": 1, "message": "no disk"}}
    tell(record)  # a rank of the first machine itself
    monkeypatch.setenv(TELL, f"{endpoint}/{job['id']}")
    tell(record)
    assert told(store, job) == [json.loads(json.dumps(record))]


@pytest.mark.parametrize("text", ["", "host", "host:", ":29400", "host:port", "host:0", "host:70000"])
def test_what_is_no_endpoint_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        Meeting.at(text)
