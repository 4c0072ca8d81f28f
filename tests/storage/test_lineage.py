import dataclasses
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.artifacts import list_artifacts
from storage.errors import StoreError, UserError
from storage.gc import collect
from storage.lineage import Lineage, LineageNode, State, read_lineage
from storage.objects import Store
from storage.runs import set_ref
from storage.verify import discard_broken, verify_all
from tests.storage.conftest import overwrite
from tests.storage.small_store import make_artifact, make_lineage, make_run


def graph_of(inputs: dict[str, Sequence[str]]) -> Lineage:
    nodes = {
        key: LineageNode(key, "model", "train", State.made, {f"r{n}": step for n, step in enumerate(steps)})
        for key, steps in inputs.items()
    }
    return Lineage(nodes)


@st.composite
def graphs(draw: st.DrawFn) -> Lineage:
    """Of up to 12 nodes, each made from any of those before it, in an order of their own."""
    size = draw(st.integers(1, 12))
    names = draw(st.permutations([f"k{n}" for n in range(size)]))
    return graph_of({name: draw(st.lists(st.sampled_from(names[:n]), max_size=4)) if n else [] for n, name in enumerate(names)})  # fmt: skip


@given(graphs())
def test_every_edge_leads_to_a_higher_layer_by_the_longest_way(graph: Lineage) -> None:
    layers = graph.layers(graph.nodes)
    for key in graph.nodes:
        assert layers[key] == max((layers[step] + 1 for step in graph.inputs(key)), default=0)


@given(graphs(), st.data())
def test_ancestors_and_descendants_mirror_each_other(graph: Lineage, data: st.DataObject) -> None:
    one, other = (data.draw(st.sampled_from(sorted(graph.nodes))) for _ in range(2))
    assert (one in graph.ancestors(other)) == (other in graph.descendants(one))
    assert one not in graph.ancestors(one) | graph.descendants(one)
    assert graph.ancestors(one) == {k for step in graph.inputs(one) for k in {step} | graph.ancestors(step)}


@given(graphs(), st.data())
def test_the_nearest_nodes_come_first_and_none_is_lost(graph: Lineage, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(graph.nodes)))
    around = graph.around(key)
    found = graph.nearest(key, around)
    assert set(found) == around
    steps = {key: 0}
    for here in found[1:]:
        steps[here] = 1 + min(steps[n] for n in (*graph.inputs(here), *graph.made_of(here)) if n in steps)
    assert list(steps.values()) == sorted(steps.values())


def test_what_only_a_report_joins_comes_last() -> None:
    graph = graph_of({"a": [], "b": ["a"], "c": ["b"], "far": [], "report": ["a", "far", "c"]})
    nodes = {**graph.nodes, "report": dataclasses.replace(graph.nodes["report"], kind="report")}
    assert Lineage(nodes).nearest("a", set(nodes), last="report") == ["a", "b", "report", "c", "far"]


def test_a_circle_of_manifests_written_by_hand_is_refused_not_followed_for_ever() -> None:
    graph = graph_of({"a": ["c"], "b": ["a"], "c": ["b"], "d": []})
    assert graph.around("a") == {"a", "b", "c"}
    with pytest.raises(StoreError, match="lead in a circle"):
        graph.layers(graph.nodes)


def test_lineage_knows_names_users_and_external_files(store: Store) -> None:
    make_run(store, "cats", make_lineage(store))
    graph = read_lineage(store)
    assert {key: node.state for key, node in graph.nodes.items()} == {
        **dict.fromkeys(("data", "teacher", "labels", "student"), State.made),
        "outside": State.files,
    }
    assert graph.nodes["labels"].name == "cats/labels"
    assert graph.nodes["labels"].runs == ("cats/1/labels",)
    assert graph.users["data"] == [("data", "labels"), ("data", "student"), ("data", "teacher")]
    assert graph.ancestors("labels") == {"data", "teacher", "outside"}
    assert graph.descendants("labels") == {"student"}


def test_gc_leaves_the_lineage_of_everything_whole(store: Store) -> None:
    lineage = make_lineage(store)
    make_run(store, "cats", lineage)
    before = read_lineage(store)
    make_lineage(store, "-2")
    second = read_lineage(store)
    collect(store, days=0)
    after = read_lineage(store)
    assert set(after.nodes) == set(second.nodes) > set(before.nodes)
    for key, node in second.nodes.items():
        assert (after.nodes[key].inputs, after.nodes[key].manifest) == (node.inputs, node.manifest)
    gone = [key for key, node in after.nodes.items() if node.state is State.deleted]
    assert sorted(gone) == ["data-2", "labels-2", "student-2", "teacher-2"]
    assert all(after.nodes[key].deleted.startswith("20") for key in gone)
    assert after.nodes["student"].state is State.made


def test_what_is_made_again_supersedes_its_tombstone(store: Store) -> None:
    lineage = make_lineage(store)
    collect(store, days=0)
    again = make_artifact(store, "model", "teacher", lineage["teacher"].inputs)
    node = read_lineage(store).nodes["teacher"]
    assert (node.state, node.manifest, node.deleted) == (State.made, again, "")
    assert store.exists("artifacts/model/teacher/tombstone.json")


def test_what_was_broken_and_discarded_stays_in_the_lineage(store: Store) -> None:
    lineage = make_lineage(store)
    make_run(store, "cats", lineage)
    overwrite(store, lineage["labels"].files[0].path, b"short")
    discard_broken(store, verify_all(store))
    graph = read_lineage(store)
    assert graph.nodes["labels"].state is State.deleted
    assert graph.ancestors("student") == {"data", "teacher", "labels", "outside"}


def test_a_manifest_that_is_lost_is_told_from_the_runs_record(store: Store) -> None:
    lineage = make_lineage(store)
    make_run(store, "cats", lineage)
    make_artifact(store, "model", "orphan", {"labels": "nobody-knows"})
    store.delete("artifacts/labels/labels/manifest.json")
    graph = read_lineage(store)
    assert graph.nodes["labels"].state is State.recorded
    assert graph.nodes["labels"].inputs == lineage["labels"].inputs
    assert graph.nodes["nobody-knows"].state is State.unknown


def test_a_ref_that_moved_on_still_names_what_it_pointed_at(store: Store) -> None:
    make_run(store, "cats", make_lineage(store, "-1"))
    make_run(store, "cats", make_lineage(store, "-2"))
    graph = read_lineage(store)
    assert graph.nodes["labels-2"].names == ("cats/labels",)
    assert graph.nodes["labels-1"].names == ("cats/labels@1",)
    assert graph.predecessor("labels-2") == ("labels-1", "cats/labels before")
    set_ref(store, "cats/labels", "labels", "labels-1")
    graph = read_lineage(store)
    assert (graph.nodes["labels-1"].name, graph.nodes["labels-2"].name) == ("cats/labels", "cats/labels@2")
    assert graph.predecessor("labels-1") == ("labels-2", "cats/labels before")


def test_without_an_older_target_the_iteration_before_is_the_predecessor(store: Store) -> None:
    lineage = make_lineage(store)
    names = {"0/teacher": "teacher", "1/student": "student"}
    make_run(store, "cats", {name: lineage[key] for name, key in names.items()})
    graph = read_lineage(store)
    assert graph.predecessor("student") == ("teacher", "cats/0/teacher")
    assert graph.predecessor("teacher") is None
    assert graph.predecessor("outside") is None


def test_an_artifact_is_found_by_ref_old_ref_and_the_beginning_of_its_key(store: Store) -> None:
    make_run(store, "cats", make_lineage(store, "-1"))
    make_run(store, "cats", make_lineage(store, "-2"))
    graph = read_lineage(store)
    assert graph.find(store, "cats/labels").key == "labels-2"
    assert graph.find(store, "cats/labels@1").key == "labels-1"
    assert graph.find(store, "teacher-2").key == "teacher-2"
    with pytest.raises(UserError, match="2 keys begin with teacher"):
        graph.find(store, "teacher")
    with pytest.raises(UserError, match="no ref 'dogs/labels'.*cats/labels"):
        graph.find(store, "dogs/labels")


def test_lineage_read_while_gc_deletes_is_whole_every_time(disk: Store) -> None:
    make_run(disk, "cats", make_lineage(disk))
    ended = threading.Event()

    def churn() -> None:
        for number in range(12):
            make_lineage(disk, f"-{number}")
            collect(disk, days=0)
        ended.set()

    thread = threading.Thread(target=churn, daemon=True)
    thread.start()
    reads = 0
    while not ended.is_set():
        graph = read_lineage(disk)
        reads += 1
        assert {"data", "teacher", "labels", "student"} <= set(graph.nodes)
        assert State.unknown not in {node.state for node in graph.nodes.values()}
    thread.join()
    assert reads > 3
    assert len(list_artifacts(disk)) == 4
