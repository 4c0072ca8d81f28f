"""One optimizer step: clipping, compilation, and what is measured before the first one."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from models import probe, zoo
from models.compute import ComputeConfig
from models.configs import TrainConfig
from models.loader import ReplicaBatch
from models.numerics import training_choices
from models.step import TrainStep
from tests.models.artifacts import NUMERICS
from tests.models.training_runs import CONFIG, changed

SGD = changed(
    optimizer={"name": "momentum", "lr_per_256": 256 / 8, "momentum": 0.0, "weight_decay": 0.0},
    schedule={"warmup_epochs": 0},
)


def made(config: TrainConfig, **numerics: Any) -> TrainStep:
    torch.manual_seed(config.seed)
    return TrainStep(config, zoo.build(config.model, 4), {**NUMERICS, **numerics}, num_labeled=48)


def batch(config: TrainConfig) -> list[ReplicaBatch]:
    return probe.made_up_batch(config, 4, True, None, config.replicas)


def moved(config: TrainConfig) -> float:
    """How far one step moves the weights, as a Euclidean norm. The learning rate is 1."""
    step = made(config)
    before = [p.detach().clone() for p in step.model.parameters()]
    step(batch(config), 0)
    pairs = zip(step.model.parameters(), before, strict=True)
    return float(torch.sqrt(sum(((p - b) ** 2).sum() for p, b in pairs)))  # type: ignore[arg-type]


def test_a_gradient_is_clipped_to_its_norm_and_a_shorter_one_is_not() -> None:
    free = moved(SGD)
    assert moved(changed(SGD, clip_norm=free / 3)) == pytest.approx(free / 3, rel=1e-3)
    assert moved(changed(SGD, clip_norm=free * 3)) == pytest.approx(free, rel=1e-6)


def test_clipping_is_of_the_true_gradient_under_a_loss_scale() -> None:
    free = moved(SGD)
    step = made(changed(SGD, clip_norm=free / 3), dtype="float16")
    before = [p.detach().clone() for p in step.model.parameters()]
    step(batch(SGD), 0)
    norm = float(torch.sqrt(sum(((p - b) ** 2).sum() for p, b in zip(step.model.parameters(), before, strict=True))))  # type: ignore[arg-type]
    assert norm == pytest.approx(free / 3, rel=2e-2)


def test_a_compiled_training_repeats_bitwise_and_agrees_with_an_eager_one() -> None:
    """Without dropout: the compiler draws other random numbers."""
    config = changed(model={"dropout": 0.0, "drop_path": 0.0}, ema_decay=0.5)

    def three_steps(**numerics: Any) -> tuple[list[float], dict[str, np.ndarray]]:
        step, some = made(config, **numerics), batch(config)
        losses = [float(step(some, number)["loss_labeled"]) for number in range(3)]
        return losses, {name: tensor.numpy().copy() for name, tensor in step.average.model.state_dict().items()}

    eager, _ = three_steps()
    first, one = three_steps(compile=True)
    second, two = three_steps(compile=True)
    assert first == second
    assert all(np.array_equal(one[name], two[name]) for name in one)
    np.testing.assert_allclose(first, eager, rtol=1e-3)


class Timed:
    """Stands for a step that takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, batch: list[ReplicaBatch], step: int) -> None:
        time.sleep(self._seconds)


SECONDS = {"eager": 0.05, "bfloat16": 0.02, "compiled": 0.01}
CHOICES = [
    {"dtype": "float32", "layout": "channels_last", "compile": False, "name": "eager"},
    {"dtype": "bfloat16", "layout": "channels_last", "compile": False, "name": "bfloat16"},
    {"dtype": "float16", "layout": "channels_last", "compile": False, "name": "broken"},
    {"dtype": "float32", "layout": "channels_last", "compile": True, "name": "compiled"},
]


def chosen(num_steps: int) -> tuple[str, list[str]]:
    """What is taken for so many steps, and what was tried."""
    tried: list[str] = []

    def make(numerics: dict[str, Any]) -> Any:
        tried.append(numerics["name"])
        if numerics["name"] == "broken":
            raise RuntimeError("no kernel for Half")
        return Timed(SECONDS[numerics["name"]])

    return probe.choose(CHOICES, make, [], num_steps, lambda line: None)["name"], tried


def test_a_short_training_takes_the_default_and_tries_nothing_else() -> None:
    assert chosen(100) == ("eager", ["eager"])


def test_a_longer_one_takes_the_fastest_that_runs_and_does_not_compile() -> None:
    assert chosen(20_000) == ("bfloat16", ["eager", "bfloat16", "broken"])


def test_a_long_one_compiles_too() -> None:
    assert chosen(1_000_000) == ("compiled", ["eager", "bfloat16", "broken", "compiled"])


def test_what_the_config_says_is_not_tried_and_the_default_comes_first() -> None:
    everything = training_choices(ComputeConfig(device="cpu"), bfloat16=True, compiler=True)
    assert {key: everything[0][key] for key in NUMERICS} == NUMERICS
    assert [choice["compile"] for choice in everything] == sorted(choice["compile"] for choice in everything)
    assert len(everything) == 5
    fixed = ComputeConfig(device="cpu", train_dtype="bfloat16", train_layout="contiguous", train_compile="always")
    assert training_choices(fixed, bfloat16=False, compiler=False) == [
        {**NUMERICS, "dtype": "bfloat16", "layout": "contiguous", "compile": True}
    ]
    plain = training_choices(ComputeConfig(device="cpu"), bfloat16=False, compiler=False)
    assert [(c["dtype"], c["layout"], c["compile"]) for c in plain] == [
        ("float32", "channels_last", False),
        ("float32", "contiguous", False),
    ]


def test_made_up_batches_have_the_shapes_of_real_ones() -> None:
    (one, two) = batch(CONFIG)
    assert (one.images.shape, one.labels.shape, one.pseudo_labels.shape) == ((12, 16, 16, 3), (4,), (8, 4))
    assert two.images.shape == one.images.shape
