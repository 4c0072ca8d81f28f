"""Networks: stochastic depth as the paper has it, early refusals, and files that timm alone reloads."""

import json
from pathlib import Path

import pytest
import timm
import timm.data
import torch
from timm.layers import DropPath
from torch import nn

from models import zoo
from models.configs import ModelConfig
from models.worker import Worker
from storage.errors import StoreError, UserError

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
TINY_RESNET = ModelConfig(name="resnet18", args=TINY, image_size=24, crop_pct=0.75, mean=(0.1, 0.2, 0.3), dropout=0.5)
NAMES = ["cat", "dog", "owl"]


def rates(model: nn.Module) -> dict[str, float]:
    return {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}


def inspect(num_classes: int = 3, **settings: object) -> dict[str, int]:
    spec = {"models": {"teacher.model": settings}, "num_classes": num_classes}
    counts: dict[str, int] = zoo.inspect_models(spec, Worker())["num_parameters"]
    return counts


def test_timms_own_rule_gives_the_last_block_less_than_was_asked() -> None:
    """The reason for the scaling; where timm changes its rule, the scaling may go."""
    assert rates(timm.create_model("efficientnet_b0", drop_path_rate=0.2))["blocks.6.0.drop_path"] == 0.1875


def test_stochastic_depth_is_linear_from_zero_to_exactly_what_was_asked_at_the_last_block() -> None:
    found = rates(zoo.build(ModelConfig(name="efficientnet_b0", drop_path=0.2), 3))
    assert found["blocks.6.0.drop_path"] == 0.2
    blocks = 16
    assert "blocks.0.0.drop_path" not in found  # the first block's rate is 0
    assert list(found.values()) == pytest.approx([0.2 * n / (blocks - 1) for n in range(1, blocks)])


def test_networks_that_reach_the_rate_by_themselves_keep_it() -> None:
    assert list(rates(zoo.build(ModelConfig(name="vit_tiny_patch16_224", drop_path=0.1), 3)).values())[-1] == 0.1


def test_without_drop_path_no_block_is_ever_dropped() -> None:
    assert not any(rates(zoo.build(ModelConfig(name="efficientnet_b0"), 3)).values())


def test_drop_path_of_a_network_that_has_none_is_refused() -> None:
    with pytest.raises(UserError, match="drop_path"):
        inspect(name="vgg11", drop_path=0.1, image_size=32)


def test_batch_norm_takes_the_momentum_of_the_training() -> None:
    norms = [m for m in zoo.build(TINY_RESNET, 3, 0.07).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.07}


def test_a_network_is_a_function_of_torchs_seed() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(zoo.build(TINY_RESNET, 3).conv1.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("name", "near"), [("resnett18", "resnet18"), ("efficientnet_b99", "efficientnet_b7"), ("efficentnet_b7", "_b7")]
)
def test_a_wrong_name_is_refused_with_near_names(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"^teacher.model.name={name}.*near names: .*{near}"):
        inspect(name=name)


def test_a_wrong_argument_is_refused_by_its_name() -> None:
    with pytest.raises(UserError, match="layerz") as refusal:
        inspect(name="resnet18", args={"layerz": [1]})
    assert "near names" not in str(refusal.value), "the name was right"


def test_a_class_count_that_is_not_the_datas_is_refused() -> None:
    with pytest.raises(UserError, match=r"num_classes.*5 classes, the data set has 3"):
        inspect(name="resnet18", args={**TINY, "num_classes": 5})
    assert inspect(name="resnet18", args={**TINY, "num_classes": 3}) == inspect(name="resnet18", args=TINY)


@pytest.mark.parametrize(
    ("name", "image_size"), [("inception_v3", 32), ("vgg11", 16), ("convnext_atto", 16), ("vit_tiny_patch16_224", 32)]
)
def test_an_image_size_that_a_network_cannot_take_is_refused_before_training(name: str, image_size: int) -> None:
    with pytest.raises(UserError, match=rf"teacher.model: {name}.*{image_size} x {image_size}.*image_size"):
        inspect(name=name, image_size=image_size)


def test_inspection_counts_the_parameters_of_the_network_that_training_builds() -> None:
    built = zoo.build(TINY_RESNET, 3)
    assert inspect(**TINY_RESNET.model_dump()) == {"teacher.model": sum(p.numel() for p in built.parameters())}


def test_a_feature_extractor_is_refused() -> None:
    with pytest.raises(UserError, match="no vector of classes"):
        inspect(name="vit_tiny_patch16_224", args={"global_pool": "", "img_size": 32}, image_size=32)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A tiny network whose weights and batch-norm statistics differ from a fresh one's."""
    torch.manual_seed(5)
    model = zoo.build(TINY_RESNET, len(NAMES)).train()
    for _ in range(3):
        model(torch.randn(8, 3, 24, 24) * 2 + 1)
    return model


def test_a_saved_network_reloads_with_timm_alone_to_the_same_logits(trained: nn.Module, tmp_path: Path) -> None:
    zoo.save(trained, TINY_RESNET, NAMES, tmp_path)
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(reloaded(images), trained.eval()(images))
        fresh = zoo.build(TINY_RESNET, len(NAMES)).eval()
        assert not torch.allclose(fresh(images), reloaded(images)), "the weights were not loaded"


def test_timm_reads_the_input_and_the_class_names_from_the_saved_config(trained: nn.Module, tmp_path: Path) -> None:
    zoo.save(trained, TINY_RESNET, NAMES, tmp_path)
    found = timm.data.resolve_data_config(model=timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert found == {
        "input_size": [3, 24, 24],
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.75,
        "crop_mode": "center",
    }
    assert json.loads((tmp_path / zoo.CONFIG_FILE).read_text())["label_names"] == NAMES


def test_a_saved_tagged_name_reloads(tmp_path: Path) -> None:
    """`tf_efficientnet_b0.ns_jft_in1k` names weights too; the architecture is what stands before the dot."""
    config = ModelConfig(name="tf_efficientnet_b0.ns_jft_in1k", image_size=32, drop_path=0.2)
    zoo.save(zoo.build(config, 3), config, NAMES, tmp_path)
    assert zoo.load_folder(tmp_path).num_classes == 3


def test_a_network_changed_after_timm_built_it_is_refused_at_save(tmp_path: Path) -> None:
    """The SVHN recipe sets strides to 1: with the same weights the plain network reloads and predicts otherwise."""
    torch.manual_seed(0)
    model = zoo.build(TINY_RESNET, len(NAMES))
    model.conv1.stride = (1, 1)
    with pytest.raises(StoreError, match="another network"):
        zoo.save(model, TINY_RESNET, NAMES, tmp_path)


def test_a_network_with_weights_that_are_not_finite_is_refused_at_save(tmp_path: Path) -> None:
    model = zoo.build(TINY_RESNET, len(NAMES))
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with pytest.raises(StoreError):
        zoo.save(model, TINY_RESNET, NAMES, tmp_path)
