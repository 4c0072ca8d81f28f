"""What a person reads while a stage works."""

import pytest

from flows import console
from flows.console import Pace, PlainDisplay, progress_line, training_facts


def test_a_training_says_loss_agreement_validation_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    clock = iter([0.0, 1.0, 21.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    display = PlainDisplay(lines.append)
    display.stage_started("1/student")
    row = {"loss_labeled": 1.25, "loss_unlabeled": 0.5, "agreement": 0.75, "learning_rate": 0.00125}
    for done in (100, 500):
        display.progress({"done": done, "total": 1000, "unit": "images", **row})
    assert lines == [
        "1/student: 500 of 1000 images, 20 images/s, 25 s left; loss 1.250, unlabeled 0.500, agreement 75%, rate 0.0013"
    ]
    assert training_facts({**row, "val_top1": 0.9125}).endswith("val 91.2%, rate 0.0013")


def test_other_stages_say_how_far_they_are_and_no_more() -> None:
    assert training_facts({"done": 1, "total": 2, "unit": "images"}) == ""


def test_a_stage_that_begins_to_count_anew_has_a_rate_of_its_new_work() -> None:
    pace = Pace()
    reports = [(0, 0.0), (900, 10.0), (0, 20.0), (50, 30.0)]
    assert [pace.rate({"done": done}, now) for done, now in reports] == [None, 90.0, None, 5.0]


def test_time_left_is_said_in_a_fitting_unit() -> None:
    ends = [
        progress_line({"done": 0, "total": total, "unit": "images"}, 10.0).split(", ")[-1]
        for total in (990, 36_000, 360_000)
    ]
    assert ends == ["99 s left", "60 min left", "10.0 h left"]
