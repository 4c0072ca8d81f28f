import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from storage.errors import StoreError, UserError
from storage.objects import Store
from storage.runs import (
    NodeRecord,
    Ref,
    RunRecord,
    latest_run,
    list_experiments,
    read_run,
    record_run,
    resolve_ref,
    set_ref,
)


def draft(experiment: str = "cats", epochs: int = 1, **fields: Any) -> RunRecord:
    node = NodeRecord(
        name="0/teacher", stage="train", kind="model", key=f"k{epochs}", version=1, config={"epochs": epochs}, inputs={}
    )
    return RunRecord(
        experiment=experiment,
        number=0,
        recipe="cats.yaml",
        config={"epochs": epochs},
        sources={},
        nodes=(node,),
        **fields,
    )


def test_runs_are_numbered_from_1_by_experiment(store: Store) -> None:
    assert latest_run(store, "cats") is None
    names = [record_run(store, draft("cats", epochs)).name for epochs in (1, 2, 3)]
    assert names == ["cats/1", "cats/2", "cats/3"]
    assert record_run(store, draft("dogs")).name == "dogs/1"
    assert list_experiments(store) == ["cats", "dogs"]
    assert latest_run(store, "cats") == read_run(store, "cats") == read_run(store, "cats/3")


def test_the_newest_run_is_the_largest_number_not_the_last_word(store: Store) -> None:
    for epochs in range(1, 12):
        record_run(store, draft(epochs=epochs))
    assert read_run(store, "cats").number == 11


def test_a_run_equal_to_the_newest_is_not_recorded_again(store: Store) -> None:
    first = record_run(store, draft(epochs=1, prefect_run="p1"))
    assert record_run(store, draft(epochs=1, prefect_run="p2")) == first
    record_run(store, draft(epochs=2))
    assert record_run(store, draft(epochs=1)).number == 3, "equal to an older run: history goes on"


def test_a_recorded_run_comes_back_whole(store: Store) -> None:
    record = record_run(store, draft(epochs=4, prefect_run="p1"))
    assert read_run(store, "cats/1") == record
    assert record.node("0/teacher") == draft(epochs=4).nodes[0]
    assert record.node("1/student") is None
    assert record.generations == {"0/teacher": 0}


@pytest.mark.parametrize("name", ["birds", "cats/7", "cats/x", "cats/²", "/1", "", "cats/-1"])
def test_an_unknown_run_names_the_experiments_there_are(store: Store, name: str) -> None:
    record_run(store, draft("cats"))
    record_run(store, draft("dogs"))
    with pytest.raises(UserError, match="experiments there: cats, dogs") as error:
        read_run(store, name)
    assert repr(name) in str(error.value)


def test_an_empty_store_says_that_it_holds_none(store: Store) -> None:
    with pytest.raises(UserError, match="experiments there: none"):
        read_run(store, "cats")
    with pytest.raises(UserError, match="refs there: none"):
        resolve_ref(store, "cats/1/student")


def test_a_record_of_another_version_is_named(store: Store) -> None:
    store.create_record("runs/cats/1.json", {"experiment": "cats", "color": "red"})
    with pytest.raises(StoreError, match=r"runs/cats/1\.json is no valid RunRecord"):
        read_run(store, "cats")


def test_a_ref_points_at_its_newest_target_and_keeps_history(store: Store) -> None:
    for key in ("k1", "k2", "k2", "k1"):
        set_ref(store, "cats/2/student", "model", key)
    assert resolve_ref(store, "cats/2/student").key == "k1"
    history = [resolve_ref(store, f"cats/2/student@{number}").key for number in (1, 2, 3)]
    assert history == ["k1", "k2", "k1"], "setting the same target again is no history"
    assert resolve_ref(store, "cats/2/student") == Ref(kind="model", key="k1")


@pytest.mark.parametrize("name", ["cats/1/student", "cats", "cats/2/student@9", "cats/2/student@x", "cats/2/student@²"])
def test_an_unknown_ref_names_the_refs_there_are(store: Store, name: str) -> None:
    set_ref(store, "cats/2/student", "model", "k1")
    set_ref(store, "cats/prepare", "dataset", "k2")
    with pytest.raises(UserError, match="refs there: cats/2/student, cats/prepare"):
        resolve_ref(store, name)


def test_concurrent_runs_are_all_recorded_under_numbers_of_their_own(store: Store) -> None:
    num, barrier = 12, threading.Barrier(12)

    def record(epochs: int) -> RunRecord:
        barrier.wait()
        return record_run(store, draft(epochs=epochs))

    with ThreadPoolExecutor(num) as pool:
        records = list(pool.map(record, range(num)))
    assert sorted(r.number for r in records) == list(range(1, num + 1))
    assert {read_run(store, r.name).config["epochs"] for r in records} == set(range(num))
    assert all(read_run(store, r.name) == r for r in records)


def test_concurrent_refs_lose_no_target(store: Store) -> None:
    num, barrier = 12, threading.Barrier(12)

    def point(number: int) -> None:
        barrier.wait()
        set_ref(store, "cats/prepare", "dataset", f"k{number}")

    with ThreadPoolExecutor(num) as pool:
        list(pool.map(point, range(num)))
    assert {resolve_ref(store, f"cats/prepare@{n}").key for n in range(1, num + 1)} == {f"k{n}" for n in range(num)}
