from pathlib import Path

import pytest

from flows.driver import Rerun
from flows.experiment import load_experiment
from flows.graph import STAGES, Node, build_graph, resolve_keys
from storage.errors import UserError
from tasks.evaluators import BY_SHORT
from tests.flows.tiny import FINGERPRINTS, RECIPE, write_recipe

EACH = ["prepare", "unlabeled", "0/teacher", "0/evaluate"] + [
    f"{n}/{role}" for n in (1, 2) for role in ("label", "select", "student", "evaluate")
]
ONCE = [
    "prepare", "unlabeled", "0/teacher", "0/evaluate", "0/label", "0/select",
    "1/label", "1/student", "1/evaluate", "2/label", "2/student", "2/evaluate",
]  # fmt: skip


def graph(folder: Path, *overrides: str, text: str = RECIPE) -> dict[str, Node]:
    nodes = build_graph(load_experiment(write_recipe(folder, text), overrides))
    assert len({node.name for node in nodes}) == len(nodes), "two nodes have one name"
    return {node.name: node for node in nodes}


def keys(nodes: dict[str, Node], data: dict[str, str] | None = None, **generations: int) -> dict[str, str]:
    return {r.name: r.key for r in resolve_keys(list(nodes.values()), {**FINGERPRINTS, **(data or {})}, generations)}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def downstream(nodes: dict[str, Node], *sources: str) -> set[str]:
    """These nodes and all that are made from them."""
    found = set(sources)
    for name, node in nodes.items():  # each follows its inputs
        if found & set(node.inputs.values()):
            found.add(name)
    return found


@pytest.mark.parametrize(
    "overrides", [(), ("order=once",), ("order=once", "selector.epochs=3"), ("iterations=[{}, {}, {}, {}]",)]
)
def test_every_node_follows_its_inputs_and_the_report_sees_all(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    nodes = graph(tmp_path, *overrides)
    before: set[str] = set()
    for name, node in nodes.items():
        assert set(node.inputs.values()) <= before, name
        before.add(name)
    assert list(nodes)[-1] == "report"
    assert set(nodes["report"].inputs.values()) == set(nodes) - {"report"}


def test_each_student_learns_from_its_teachers_own_selection_and_teaches_the_next(tmp_path: Path) -> None:
    nodes = graph(tmp_path)
    assert list(nodes) == [*EACH, "report"]
    assert nodes["0/teacher"].inputs == {"data": "prepare"}
    assert nodes["0/evaluate"].inputs == {"data": "prepare", "model": "0/teacher"}
    assert nodes["1/label"].inputs == {"data": "unlabeled", "model": "0/teacher"}
    assert nodes["2/label"].inputs == {"data": "unlabeled", "model": "1/student"}
    assert nodes["2/select"].inputs == {"data": "unlabeled", "labels": "2/label"}
    assert nodes["2/student"].inputs == {"data": "prepare", "selection": "2/select"}
    assert nodes["2/evaluate"].inputs == {"data": "prepare", "model": "2/student"}


def test_once_selects_once_and_each_teacher_labels_only_the_selected_images(tmp_path: Path) -> None:
    nodes = graph(tmp_path, "order=once")
    assert list(nodes) == [*ONCE, "report"]
    assert nodes["0/label"].inputs == {"data": "unlabeled", "model": "0/teacher"}
    assert nodes["0/select"].inputs == {"data": "unlabeled", "labels": "0/label"}
    assert nodes["1/label"].inputs == {"data": "unlabeled", "model": "0/teacher", "selection": "0/select"}
    assert nodes["2/label"].inputs == {"data": "unlabeled", "model": "1/student", "selection": "0/select"}
    assert nodes["2/student"].inputs == {"data": "prepare", "selection": "0/select", "labels": "2/label"}


def test_a_selector_scores_all_images_and_teaches_nobody(tmp_path: Path) -> None:
    nodes = graph(tmp_path, "order=once", "selector.epochs=3")
    assert nodes["0/selector"].config.model_dump()["epochs"] == 3.0
    assert [name for name, node in nodes.items() if "0/selector" in node.inputs.values()] == ["0/label", "report"]
    assert nodes["1/label"].inputs["model"] == "0/teacher"


def test_every_node_names_its_stage_role_and_section(tmp_path: Path) -> None:
    asked = [f"evaluate.{short}={{}}" for short in BY_SHORT]
    nodes = graph(tmp_path, "order=once", "selector.epochs=3", *asked)
    assert {n.stage for n in nodes.values()} == set(STAGES) - {"import", "testset"}, "those of `nst evaluate` alone"
    for node in nodes.values():
        assert isinstance(node.config, STAGES[node.stage].config)
    sections = {
        name: (nodes[name].role, nodes[name].section) for name in ("prepare", "0/selector", "2/student", "1/label")
    }
    assert sections == {
        "prepare": ("prepare", "data"),
        "0/selector": ("selector", "selector"),
        "2/student": ("student", "iterations.2"),
        "1/label": ("label", "label"),
    }
    assert nodes["2/evaluate-imagenet-c"].section == "evaluate.imagenet_c"


def test_an_evaluator_that_a_recipe_asks_for_runs_on_every_model_and_changes_no_other_key(tmp_path: Path) -> None:
    plain = keys(graph(tmp_path))
    asked = keys(graph(tmp_path, "evaluate.corrupted={severities: [3]}", "evaluate.fgsm={}"))
    added = {f"{n}/evaluate-{short}" for n in (0, 1, 2) for short in ("corrupted", "fgsm")}
    assert asked.keys() - plain.keys() == added
    assert {name for name in plain if plain[name] != asked[name]} == {"report"}
    other = keys(graph(tmp_path, "evaluate.corrupted={severities: [4]}", "evaluate.fgsm={}"))
    assert {n for n in asked if asked[n] != other[n]} == {*(f"{n}/evaluate-corrupted" for n in (0, 1, 2)), "report"}


def test_an_archives_place_is_no_part_of_a_key_but_its_listing_is(tmp_path: Path) -> None:
    found = []
    for root, listing in (("/a", "1" * 32), ("/b", "1" * 32), ("/a", "2" * 32)):
        nodes = graph(tmp_path, f"evaluate.subset.root={root}")
        assert "data" not in nodes["0/evaluate-subset"].inputs
        found.append(keys(nodes, {f"archive:{root}": listing})["0/evaluate-subset"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("override", "sources"),
    [
        ("data.seed=1", ["prepare"]),
        ("data.in_place=false", ["unlabeled"]),
        ("data.shard_images=7", ["prepare", "unlabeled"]),
        ("data.root=/elsewhere", []),
        ("train.seed=1", ["0/teacher", "1/student", "2/student"]),
        ("teacher.epochs=3", ["0/teacher"]),
        ("student.epochs=3", ["1/student", "2/student"]),
        ("student.temperature=2", ["1/student", "2/student"]),
        ("iterations.1.batch_ratio=3", ["1/student"]),
        ("iterations.2.model.drop_path=0.1", ["2/student"]),
        ("select.min_confidence=0.4", ["1/select", "2/select"]),
        ("compute.inference_batch=3", []),
        ("student.allow_smaller=true", []),
    ],
)
@pytest.mark.parametrize("order", ["each_iteration", "once"])
def test_a_changed_field_changes_exactly_the_keys_downstream_of_it(
    tmp_path: Path, order: str, override: str, sources: list[str]
) -> None:
    nodes = graph(tmp_path, f"order={order}")
    if order == "once" and override.startswith("select"):
        sources = ["0/select"]
    expected = downstream(nodes, *sources)
    assert changed(keys(nodes), keys(graph(tmp_path, f"order={order}", override))) == expected


def test_a_new_threshold_leaves_data_and_first_labels_alone(tmp_path: Path) -> None:
    """The case worked out by hand that `downstream` is checked against."""
    nodes = graph(tmp_path)
    found = changed(keys(nodes), keys(graph(tmp_path, "select.min_confidence=0.4")))
    assert found == {*EACH, "report"} - {"prepare", "unlabeled", "0/teacher", "0/evaluate", "1/label"}
    found = changed(keys(nodes), keys(graph(tmp_path, "iterations.1.batch_ratio=3")))
    assert found == {*EACH, "report"} - {"prepare", "unlabeled", "0/teacher", "0/evaluate", "1/label", "1/select"}


def test_once_a_new_student_changes_no_selection(tmp_path: Path) -> None:
    nodes = graph(tmp_path, "order=once")
    found = changed(keys(nodes), keys(graph(tmp_path, "order=once", "iterations.1.epochs=3")))
    assert found == {"1/student", "1/evaluate", "2/label", "2/student", "2/evaluate", "report"}


def test_other_labeled_images_change_every_key(tmp_path: Path) -> None:
    nodes = graph(tmp_path)
    assert changed(keys(nodes), keys(nodes, {"prepare": "f" * 32})) == set(nodes)


def test_other_unlabeled_images_leave_the_first_teacher_as_it_is(tmp_path: Path) -> None:
    nodes = graph(tmp_path)
    found = changed(keys(nodes), keys(nodes, {"unlabeled": "f" * 32}))
    assert found == set(nodes) - {"prepare", "0/teacher", "0/evaluate"}


def test_the_name_of_the_experiment_changes_only_the_report(tmp_path: Path) -> None:
    nodes = graph(tmp_path)
    assert changed(keys(nodes), keys(graph(tmp_path, "name=other"))) == {"report"}


def test_equal_students_of_two_iterations_have_keys_of_their_own(tmp_path: Path) -> None:
    found = keys(graph(tmp_path))
    assert len(set(found.values())) == len(found)


def test_several_teachers_are_the_newest_models(tmp_path: Path) -> None:
    nodes = graph(tmp_path, "label.num_teachers=2")
    assert nodes["1/label"].inputs == {"data": "unlabeled", "model": "0/teacher"}
    assert nodes["2/label"].inputs == {"data": "unlabeled", "model": "1/student", "model.2": "0/teacher"}
    changed_nodes = changed(keys(graph(tmp_path)), keys(nodes))
    assert changed_nodes == {"2/label", "2/select", "2/student", "2/evaluate", "report"}


def test_a_generation_changes_its_node_and_what_follows(tmp_path: Path) -> None:
    nodes = graph(tmp_path)
    plain = keys(nodes)
    assert keys(nodes, **dict.fromkeys(nodes, 0)) == plain
    for name in ("prepare", "0/teacher", "1/select", "2/evaluate"):
        assert changed(plain, keys(nodes, **{name: 1})) == downstream(nodes, name)
    assert changed(keys(nodes, **{"1/select": 1}), keys(nodes, **{"1/select": 2})) == downstream(nodes, "1/select")


def test_a_record_holds_what_its_key_is_made_from(tmp_path: Path) -> None:
    nodes = graph(tmp_path)
    records = {r.name: r for r in resolve_keys(list(nodes.values()), FINGERPRINTS, {"1/select": 2})}
    select, data = records["1/select"], records["unlabeled"]
    assert (select.stage, select.kind, select.generation) == ("select", "selection", 2)
    assert select.config == {"images_per_class": 100}
    assert select.inputs == {"data": data.key, "labels": records["1/label"].key}
    assert data.inputs == {"data": records["prepare"].key, "source": FINGERPRINTS["unlabeled"]}


@pytest.mark.parametrize(
    ("text", "covered"),
    [
        ("nothing", []),
        ("select", ["1/select", "2/select"]),
        ("2/select", ["2/select"]),
        ("prepare", ["prepare"]),
        ("0/evaluate", ["0/evaluate"]),
        ("evaluate", ["0/evaluate", "1/evaluate", "2/evaluate"]),
    ],
)
def test_a_rerun_covers_a_role_of_one_iteration_or_all(tmp_path: Path, text: str, covered: list[str]) -> None:
    rerun = Rerun.parse(text)
    assert [name for name, node in graph(tmp_path).items() if rerun.covers(node)] == covered


@pytest.mark.parametrize("text", ["selec", "2/", "/", "x/select", "²/select", "-1/select", "1/2/select"])
def test_an_unknown_rerun_names_the_stages(text: str) -> None:
    with pytest.raises(UserError, match="choose from prepare, unlabeled, teacher, .*or of one iteration: 2/select"):
        Rerun.parse(text)
