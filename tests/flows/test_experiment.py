from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flows.experiment import RECIPES, Experiment, load_experiment, merge
from flows.graph import build_graph, resolve_keys
from models.configs import TrainConfig
from storage.errors import UserError
from tests.flows.tiny import FINGERPRINTS, RECIPE, write_recipe

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(folder: Path, *overrides: str, text: str = RECIPE, scale: str = "") -> Experiment:
    return load_experiment(write_recipe(folder, text), overrides, scale)


def message(folder: Path, *overrides: str, text: str = RECIPE, scale: str = "") -> str:
    """The one line that a user sees for this mistake."""
    with pytest.raises(UserError) as error:
        load(folder, *overrides, text=text, scale=scale)
    assert "\n" not in str(error.value)
    return str(error.value)


def keys(experiment: Experiment) -> dict[str, str]:
    return {record.name: record.key for record in resolve_keys(build_graph(experiment), FINGERPRINTS, {})}


def epochs(experiment: Experiment) -> list[float]:
    return [config.epochs for config in experiment.networks().values()]


def test_student_and_teacher_inherit_from_train_and_iterations_from_student(tmp_path: Path) -> None:
    experiment = load(tmp_path)
    assert epochs(experiment) == [50.0, 20.0, 20.0]
    assert [config.batch_ratio for config in experiment.iterations] == [4.0, 4.0]
    assert experiment.teacher.batch_ratio == TrainConfig.model_fields["batch_ratio"].default
    assert {config.labeled_batch for config in experiment.networks().values()} == {32}


def test_an_iteration_keeps_the_fields_of_a_section_that_it_only_adds_to(tmp_path: Path) -> None:
    text = RECIPE.replace("iterations: [{}, {}]", "iterations: [{}, {model: {drop_path: 0.2}, epochs: 7}]")
    first, second = load(tmp_path, text=text).iterations
    assert (first.model.drop_path, first.epochs) == (0.0, 20.0)
    assert (second.model.drop_path, second.model.name, second.model.image_size, second.epochs) == (
        0.2,
        "resnet18",
        32,
        7,
    )


@given(
    *[
        st.recursive(
            st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6
        ).filter(lambda value: isinstance(value, dict))
    ]
    * 2
)
def test_merge_keeps_what_is_not_overlaid_and_changes_neither_side(base: dict[str, Any], top: dict[str, Any]) -> None:
    before = (repr(base), repr(top))
    merged = merge(base, top)
    assert merge(merged, top) == merged
    assert merge({}, top) == top
    assert merge(base, {}) == base
    assert merged.keys() == base.keys() | top.keys()
    assert all(merged[name] == base[name] for name in base.keys() - top.keys())
    assert (repr(base), repr(top)) == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=3", [50.0, 3.0, 3.0]),
        ("teacher.epochs=3", [3.0, 20.0, 20.0]),
        ("student.epochs=3", [50.0, 3.0, 3.0]),
        ("iterations.1.epochs=3", [50.0, 3.0, 20.0]),
        ("iterations.2.epochs=2.5e0", [50.0, 20.0, 2.5]),
    ],
)
def test_an_override_reaches_exactly_the_networks_below_its_section(
    tmp_path: Path, override: str, expected: list[float]
) -> None:
    assert epochs(load(tmp_path, override)) == expected


def test_an_override_of_iteration_2_changes_only_iteration_2(tmp_path: Path) -> None:
    plain, changed = load(tmp_path), load(tmp_path, "iterations.2.batch_ratio=28")
    assert [config.batch_ratio for config in changed.iterations] == [4.0, 28.0]
    assert changed.iterations[0] == plain.iterations[0]
    different = {name for name, key in keys(changed).items() if keys(plain)[name] != key}
    assert different == {"2/student", "2/evaluate", "report"}


def test_the_last_of_several_overrides_wins(tmp_path: Path) -> None:
    assert epochs(load(tmp_path, "student.epochs=3", "iterations.1.epochs=4", "student.epochs=5")) == [50.0, 4.0, 5.0]


def test_overrides_make_sections_that_the_recipe_leaves_out(tmp_path: Path) -> None:
    experiment = load(
        tmp_path,
        "student.unlabeled_noise.num_ops=1",
        "train.model.args.layers=[1, 1]",
        "data.digits.seed=3",
        text=RECIPE.replace("iterations: [{}, {}]", "iterations: [null]"),
    )
    assert experiment.iterations[0].unlabeled_noise is not None
    assert experiment.iterations[0].unlabeled_noise.num_ops == 1
    assert experiment.teacher.model.args == {"layers": [1, 1]}
    assert experiment.data.digits.seed == 3


def test_a_recipe_without_iterations_has_one(tmp_path: Path) -> None:
    text = RECIPE.replace("iterations: [{}, {}]\n", "")
    assert len(load(tmp_path, text=text).iterations) == 1
    assert load(tmp_path, "iterations.1.epochs=3", text=text).iterations[0].epochs == 3.0
    assert "the last one here is 1" in message(tmp_path, "iterations.2.epochs=3", text=text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.epoch=3", "override: unknown field student.epoch -> did you mean student.epochs?"),
        ("studnet.epochs=3", "override: unknown field studnet -> did you mean student?"),
        ("iterations.2.batch_ration=3", "unknown field iterations.2.batch_ration -> did you mean iterations.2.batch_ratio?"),
        ("select.min_confidance=0.5", "-> did you mean select.min_confidence?"),
        ("train.noise.qqq=1", "unknown field train.noise.qqq; fields there: crop, pad_px, min_area"),
        ("min_confidence=0.5", "unknown field min_confidence -> did you mean select.min_confidence?"),
        ("epochs=3", "unknown field epochs -> did you mean train.epochs?"),
        ("iterations.0.epochs=3", "iterations.0: iterations are counted from 1, the last one here is 2"),
        ("iterations.3.epochs=3", "iterations.3: iterations are counted from 1, the last one here is 2"),
        ("iterations.-1.epochs=3", "iterations.-1: iterations are counted from 1"),
        ("iterations.².epochs=3", "iterations.²: iterations are counted from 1"),
        ("iterations.last.epochs=3", "iterations.last: iterations are counted from 1"),
        ("train.epochs=many", "override: train.epochs=many: input should be a valid number"),
        ("train.seed=1.5", "override: train.seed=1.5: input should be a valid integer"),
        ("train.labeled_batch=[32]", "override: train.labeled_batch=[32]: input should be a valid integer"),
        ("order=twice", "override: order=twice: input should be 'each_iteration' or 'once'"),
        ("train=5", "override: train=5: input should be a valid dictionary"),
        ("student.epochs=-1", "tiny.yaml: student.epochs: input should be greater than or equal to 0 (found -1)"),
        ("train.seed=-1", "tiny.yaml: train.seed: input should be greater than or equal to 0 (found -1)"),
        ("train.epochs=.inf", "input should be a finite number (found inf)"),
        ("train.noise.ops=[Rotat]", "tiny.yaml: train.noise: unknown operations Rotat; choose from AutoContrast"),
        ("iterations.2.replicas=5", "tiny.yaml: iterations.2: labeled_batch=32 does not divide into replicas=5 equal parts"),
        ("compute.ranks=3", "compute.ranks=3 does not divide teacher.replicas=1; set compute.ranks to a divisor"),
        ("selector.epochs=3", "selector is set, but only order=once uses one"),
        ("train.noise.num_ops.x=3", "train.noise.num_ops is a single value, it has no field 'x'"),
        ("train.model.name.x=3", "train.model.name is a single value, it has no field 'x'"),
        ("iterations=3", "iterations must be a list with one entry a student"),
        ("name=Two Words", "tiny.yaml: name: string should match pattern"),
        ("scales.smoke=1", "a scale is part of the recipe; edit it there and choose it with --scale"),
        ("student.epochs", "override 'student.epochs' has no '='; write it as field.name=value"),
        ("=3", "override '=3' has no '='"),
        ("student.epochs=[", "override 'student.epochs=[': the value is no YAML"),
    ],
)  # fmt: skip
def test_a_wrong_override_says_what_to_write_instead(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in message(tmp_path, override)


def test_a_step_into_a_value_that_is_no_section_is_refused(tmp_path: Path) -> None:
    text = RECIPE.replace("image_size: 32", "args: {layers: [1, 2]}")
    assert "train.model.args.layers is no section" in message(tmp_path, "train.model.args.layers.0=3", text=text)
    text = RECIPE.replace("{name: resnet18, image_size: 32}", "resnet18")
    assert "train.model is no section" in message(tmp_path, "train.model.name=resnet50", text=text)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  epochs: 20", "  epoch: 20", "tiny.yaml: unknown field train.epoch -> did you mean train.epochs?"),
        ("teacher: {epochs", "teacher: {epoch", "tiny.yaml: unknown field teacher.epoch -> did you mean teacher.epochs?"),
        ("student: {batch_ratio", "student: {ratio", "tiny.yaml: unknown field student.ratio"),
        ("[{}, {}]", "[{}, {epoch: 3}]", "tiny.yaml: unknown field iterations.2.epoch -> did you mean iterations.2.epochs?"),
        ("student:", "studnet:", "tiny.yaml: unknown field studnet -> did you mean student?"),
        ("name: tiny\n", "", "tiny.yaml: name is missing; add it to the recipe or set name=VALUE"),
        ("  model: {name: resnet18, image_size: 32}\n", "", "tiny.yaml: train.model is missing; add it to the recipe"),
        ("name: resnet18, ", "", "tiny.yaml: train.model.name is missing; add it to the recipe"),
        ("labeled_batch: 32", "labeled_batch: many", "tiny.yaml: train.labeled_batch: input should be a valid integer"),
        ("image_size: 32", "image_size: 5000", "train.model.image_size: input should be less than or equal to 4096 (found 5000)"),
        ("teacher: {epochs: 50}", "teacher: {epochs: soon}", "tiny.yaml: teacher.epochs: input should be a valid number"),
        ("[{}, {}]", "[{}, {epochs: soon}]", "tiny.yaml: iterations.2.epochs: input should be a valid number"),
        ("select: {images_per_class: 100}", "select: {min_confidence: 2}", "tiny.yaml: select.min_confidence: input should be less"),
        ("teacher: {epochs: 50}", "teacher: 50", "tiny.yaml: teacher must be a section of fields (found 50)"),
        ("student: {batch_ratio: 4}", "student: [4]", "tiny.yaml: student must be a section of fields (found [4])"),
        ("select: {images_per_class: 100}", "select: 100", "tiny.yaml: select: input should be a valid dictionary"),
        ("[{}, {}]", "[]", "tiny.yaml: iterations: tuple should have at least 1 item"),
        ("[{}, {}]", "2", "tiny.yaml: iterations must be a list with one entry a student"),
        ("[{}, {}]", "[2]", "tiny.yaml: iterations must be a list with one entry a student"),
        ("  smoke: {teacher.epochs: 1, student.epochs: 2, iterations.2.batch_ratio: 1}", "  smoke: 3", "tiny.yaml: scales must map"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_names_file_and_field_as_the_recipe_has_it(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert RECIPE.count(old) == 1
    assert expected in message(tmp_path, text=RECIPE.replace(old, new))


def test_a_missing_train_section_is_named(tmp_path: Path) -> None:
    assert "tiny.yaml: train.model is missing" in message(tmp_path, text="name: tiny\n")


@pytest.mark.parametrize("text", ["", "[1, 2]", "name: [", "just words", "\t- x"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    assert "tiny.yaml" in message(tmp_path, text=text)


def test_several_mistakes_are_one_line_each(tmp_path: Path) -> None:
    text = RECIPE.replace("labeled_batch: 32", "labeled_batch: many").replace("teacher: {epochs", "teacher: {epoch")
    with pytest.raises(UserError) as error:
        load(tmp_path, text=text)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert any("teacher.epoch " in line for line in lines)
    assert any("train.labeled_batch" in line for line in lines)


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(UserError, match="'nowhere' is no file in .* and no shipped recipe; shipped: .*digits"):
        load_experiment("nowhere")


def test_a_misspelled_recipe_is_guessed(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(UserError, match=r"tiny.yml' is no file in .* -> did you mean tiny.yaml\?"):
        load_experiment(recipe.replace(".yaml", ".yml"))
    with pytest.raises(UserError, match=r"'imagenet-b77' .* -> did you mean imagenet-b7\?"):
        load_experiment("imagenet-b77")


def test_a_recipe_may_be_given_by_its_url(tmp_path: Path) -> None:
    url = Path(write_recipe(tmp_path)).as_uri()
    assert epochs(load_experiment(url, ["student.epochs=3"], "smoke")) == [1.0, 3.0, 3.0]
    for wrong, expected in ((url.replace("tiny", "gone"), "there is no such file"), ("ftp://x/y.yaml", "'ftp'")):
        with pytest.raises(UserError, match=expected):
            load_experiment(wrong)
    write_recipe(tmp_path, f"base: low.yaml\n{RECIPE}")
    with pytest.raises(UserError, match="base='low.yaml' is read beside files only"):
        load_experiment(url)


def test_a_scale_is_applied_below_the_overrides(tmp_path: Path) -> None:
    assert epochs(load(tmp_path, scale="smoke")) == [1.0, 2.0, 2.0]
    assert [config.batch_ratio for config in load(tmp_path, scale="smoke").iterations] == [4.0, 1.0]
    assert epochs(load(tmp_path, "student.epochs=9", scale="smoke")) == [1.0, 9.0, 9.0]
    assert epochs(load(tmp_path)) == [50.0, 20.0, 20.0], "a scale that was not asked for does nothing"


def test_an_unknown_scale_names_those_there_are(tmp_path: Path) -> None:
    assert message(tmp_path, scale="huge") == "tiny.yaml: no scale 'huge'; it offers smoke"
    text = RECIPE.replace("teacher.epochs: 1", "teacher.epoch: 1")
    assert "tiny.yaml: unknown field teacher.epoch" in message(tmp_path, text=text, scale="smoke")


def test_allow_smaller_and_compute_enter_no_key(tmp_path: Path) -> None:
    plain = keys(load(tmp_path))
    for override in (
        "student.allow_smaller=true",
        "compute.inference_batch=7",
        "compute.loader_workers=0",
        "data.root=/x",
    ):
        assert keys(load(tmp_path, override)) == plain, override
    assert load(tmp_path, "student.allow_smaller=true").iterations[0].allow_smaller


@pytest.mark.parametrize(
    "override",
    ["batch_ratio=9", "pseudo_labels=hard", "temperature=2", "loss=sum_of_means", "unlabeled_noise.num_ops=1"],
)
def test_a_teachers_key_does_not_change_with_what_only_students_use(tmp_path: Path, override: str) -> None:
    text = RECIPE.replace("student: {batch_ratio: 4}\n", "")
    plain, changed = keys(load(tmp_path, text=text)), keys(load(tmp_path, f"train.{override}", text=text))
    assert changed["0/teacher"] == plain["0/teacher"]
    assert changed["1/student"] != plain["1/student"]


def test_a_teachers_key_changes_with_what_it_uses(tmp_path: Path) -> None:
    plain = keys(load(tmp_path))
    for override in ("train.seed=1", "teacher.epochs=3", "train.noise.magnitude=3", "train.model.dropout=0.5"):
        assert keys(load(tmp_path, override))["0/teacher"] != plain["0/teacher"], override


def test_description_and_scales_enter_no_key(tmp_path: Path) -> None:
    text = RECIPE.replace("name: tiny\n", "name: tiny\ndescription: other words\n").split("scales:")[0]
    assert keys(load(tmp_path, text=text)) == keys(load(tmp_path))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_at_every_scale(name: str) -> None:
    scales = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text()).get("scales") or {}).keys()
    for scale in ("", *scales):
        experiment = load_experiment(name, (), scale)
        assert experiment.name == name
        assert len(keys(experiment)) == len(build_graph(experiment))


def test_recipes_are_shipped() -> None:
    assert {"digits", "cifar10"} <= set(SHIPPED)


def test_a_loaded_experiment_survives_its_run_record(tmp_path: Path) -> None:
    experiment = load(tmp_path, "student.unlabeled_noise.num_ops=1")
    assert Experiment.model_validate(experiment.model_dump(mode="json")) == experiment
