"""The shipped recipes say what the paper and the released code say; each number stands here a second time, by its source."""

from pathlib import Path

import pytest
import timm

from flows.experiment import RECIPES, Experiment, load_experiment
from flows.graph import build_graph
from models import variants
from models.configs import PAPER_OPS, RELEASED_OPS
from models.schedule import learning_rate, total_steps
from storage.errors import UserError

# size, dropout, RandAugment magnitude, epochs, batch ratio (paper: section 3.1, table 9; released scripts)
EFFICIENTNETS = {
    0: (224, 0.2, 6, 700, 1),
    1: (240, 0.2, 6, 700, 3),
    2: (260, 0.3, 6, 700, 3),
    3: (300, 0.3, 12, 700, 3),
    4: (380, 0.4, 15, 700, 3),
    5: (456, 0.4, 18, 350, 3),
    6: (528, 0.5, 24, 350, 3),
    7: (600, 0.5, 27, 350, 3),
}
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
IMAGENET = 1_281_167


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_makes_a_graph_of_networks_that_timm_has(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert [node.name for node in build_graph(experiment)][-1] == "report"
    assert [c.model.name for c in experiment.networks().values() if not timm.is_model(c.model.name)] == []


@pytest.mark.parametrize("number", EFFICIENTNETS)
def test_an_efficientnet_is_trained_as_the_paper_says(number: int) -> None:
    experiment = load_experiment(f"imagenet-b{number}")
    size, dropout, magnitude, epochs, ratio = EFFICIENTNETS[number]
    for config in (experiment.teacher, *experiment.iterations):
        model = config.model
        assert (model.name, model.image_size, model.dropout) == (f"tf_efficientnet_b{number}", size, dropout)
        assert model.drop_path == 0.2
        assert model.crop_pct == pytest.approx(size / (size + 32), abs=1e-3)
        assert (config.noise.magnitude, config.noise.num_ops, config.noise.ops) == (magnitude, 2, PAPER_OPS)
        assert (config.epochs, config.schedule.decay_epochs) == (epochs, 2.4 if epochs == 350 else 4.8)
        _has_the_papers_optimizer(experiment)
    assert [student.batch_ratio for student in experiment.iterations] == [ratio]
    assert (experiment.select.min_confidence, experiment.select.images_per_class) == (0.3, 130_000)
    selector = experiment.selector or experiment.teacher
    assert (experiment.order, selector.model.name) == ("once", "tf_efficientnet_b0")


def _has_the_papers_optimizer(experiment: Experiment) -> None:
    for config in experiment.networks().values():
        if config.init == "model":
            continue  # a fine-tuning
        own = config.optimizer
        assert (own.name, own.lr_per_256, own.decay, own.momentum, own.eps) == ("rmsproptf", 0.016, 0.9, 0.9, 1e-3)
        assert (config.labeled_batch, config.ema_decay, config.label_smoothing) == (2048, 0.9999, 0.1)
        assert (own.weight_decay, config.bn_momentum, config.loss) == (1e-5, 0.01, "concatenated")
        assert learning_rate(config, total_steps(config, IMAGENET) // 50 * 1, IMAGENET) <= 0.128


def test_the_rate_of_the_paper_starts_at_0_128_and_falls_by_0_97_in_steps() -> None:
    """Section 3.1: 0.128 at a labeled batch of 2048, x0.97 every 2.4 epochs (350 epochs)."""
    config = load_experiment("imagenet-b7").teacher
    steps_an_epoch = IMAGENET / 2048

    def at(epoch: float) -> float:
        return learning_rate(config, round(epoch * steps_an_epoch), IMAGENET)

    assert at(2.5) == pytest.approx(0.064, rel=0.01)  # half of five epochs of warm-up
    assert at(5.1) == pytest.approx(0.128 * 0.97**2)  # counted from the start
    assert at(7.1) == at(5.1)
    assert at(7.3) == pytest.approx(0.128 * 0.97**3)


def test_l2_is_taught_by_b7_and_then_twice_by_itself_and_fine_tuned_at_800_pixels() -> None:
    """Section 3.1 and table 7."""
    experiment = load_experiment("imagenet-l2")
    assert experiment.teacher.model.name == "tf_efficientnet_b7"
    assert [student.model.name for student in experiment.iterations] == ["tf_efficientnet_l2"] * 3
    assert [student.batch_ratio for student in experiment.iterations] == [14, 14, 28]
    for student in experiment.iterations:
        assert (student.model.image_size, student.epochs, student.noise.magnitude) == (475, 350, 27)
        second = student.finetuning()
        assert (second.epochs, second.model.image_size) == (1.5, 800)
        assert (second.noise.crop, second.noise.flip, second.noise.num_ops) == ("none", False, 0)
        assert second.frozen_layers > 0
    names = {node.name: node.inputs for node in build_graph(experiment)}
    assert names["2/label"]["model"] == "1/finetune"
    assert names["1/finetune"]["initial"] == "1/student"
    assert names["3/evaluate"]["model"] == "3/finetune"


def test_resnet_50_has_randaugment_of_magnitude_9() -> None:
    experiment = load_experiment("imagenet-resnet50")
    assert {(c.model.name, c.noise.magnitude) for c in (experiment.teacher, *experiment.iterations)} == {
        ("resnet50", 9)
    }


def test_svhn_is_the_released_scripts() -> None:
    experiment = load_experiment("svhn")
    (student,) = experiment.iterations
    noise, model = student.noise, student.model
    assert model.name == variants.efficientnet_b0_svhn.__name__
    assert (student.labeled_batch, student.batch_ratio, student.optimizer.weight_decay) == (128, 5, 1e-4)
    assert (noise.crop, noise.pad_px, noise.flip, noise.magnitude) == ("pad", 4, False, 5)
    assert (noise.translate_px, noise.cutout_px, noise.patch_px, noise.ops) == (4, 4, 8, RELEASED_OPS)
    assert (model.mean, model.std) == ((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197))
    assert (experiment.select.images_per_class, experiment.select.min_confidence) == (53_113, 0.3)
    assert (experiment.data.torchvision.dataset, experiment.data.torchvision.num_val) == ("SVHN", 4000)
    last = total_steps(student, 69_257) - 1
    assert learning_rate(student, last, 69_257) * 256 / 128 == pytest.approx(2e-4, rel=1e-2)


def test_a_recipe_lies_upon_its_base_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text(
        "train: {epochs: 7, model: {name: resnet18, image_size: 40}}\niterations: [{}, {}]"
    )
    (tmp_path / "high.yaml").write_text("base: low.yaml\nname: high\ntrain: {model: {image_size: 64}}")
    found = load_experiment(str(tmp_path / "high.yaml"), ["iterations.2.batch_ratio=5"])
    assert (found.teacher.epochs, found.teacher.model.name, found.teacher.model.image_size) == (7, "resnet18", 64)
    assert found.iterations[1].batch_ratio == 5


@pytest.mark.parametrize(
    ("base", "message"), [("gone.yaml", "base='gone.yaml' is no file"), ("me.yaml", "lies upon this file itself")]
)
def test_a_base_that_is_missing_or_a_circle_is_refused(tmp_path: Path, base: str, message: str) -> None:
    (tmp_path / "me.yaml").write_text(f"base: {base}\nname: me\ntrain: {{model: {{name: resnet18}}}}")
    with pytest.raises(UserError, match=message):
        load_experiment(str(tmp_path / "me.yaml"))


def test_fixed_layers_of_a_teacher_that_starts_at_random_are_refused(tmp_path: Path) -> None:
    """Also where they stand in the common part together with a warm start, which only students have."""
    (tmp_path / "me.yaml").write_text(
        "name: me\ntrain: {model: {name: resnet18}, init: model, frozen_layers: 0.5}\niterations: [{}]"
    )
    with pytest.raises(UserError, match=r"teacher.frozen_layers=0.5 would keep random weights; set teacher.pretrained"):
        load_experiment(str(tmp_path / "me.yaml"))
