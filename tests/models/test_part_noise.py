"""Dropout and stochastic depth may be switched off for unlabeled images alone (table 6)."""

import pytest
import torch
from torch import nn

from models import variants  # noqa: F401  (registers its networks)
from models.configs import ModelConfig, TrainConfig
from models.part_noise import spare_unlabeled
from models.zoo import build
from storage.errors import UserError

NETWORKS = {"tf_efficientnet_b0": 64, "resnet18": 64, "vit_tiny_patch16_224": 224, "convnext_atto": 64}
VIT = "vit_tiny_patch16_224"  # its blocks do something before they are trained, unlike ResNet's


def noised(name: str, **fields: bool) -> tuple[nn.Module, TrainConfig]:
    config = TrainConfig(model=ModelConfig(name=name, dropout=0.5, drop_path=0.5), **fields)
    torch.manual_seed(0)
    model = build(config.model, 10).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model, config


def spread(model: nn.Module, size: int) -> torch.Tensor:
    """How far the logits of each of four images differ between passes with other seeds, float [4]."""
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        passes = []
        for seed in range(6):
            torch.manual_seed(seed)
            passes.append(model(images))
    difference: torch.Tensor = (torch.stack(passes) - passes[0]).abs().amax(dim=(0, 2))
    return difference


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_behind_the_labeled_ones_have_no_noise(name: str) -> None:
    model, config = noised(name, unlabeled_dropout=False, unlabeled_drop_path=False)
    spare_unlabeled(model, config).count = 2
    found = spread(model, NETWORKS[name])
    assert (found[:2] > 0).all()
    assert (found[2:] == 0).all()


@pytest.mark.parametrize("kept", ["unlabeled_dropout", "unlabeled_drop_path"])
def test_each_of_the_two_can_be_kept(kept: str) -> None:
    model, config = noised(VIT, **{"unlabeled_dropout": False, "unlabeled_drop_path": False, kept: True})
    spare_unlabeled(model, config).count = 2
    assert (spread(model, NETWORKS[VIT]) > 0).all()


def test_labeled_rows_have_the_noise_that_they_would_have_alone() -> None:
    """The same draws: a batch without unlabeled images is a plain batch."""
    plain, _ = noised(VIT)
    spared, config = noised(VIT, unlabeled_dropout=False, unlabeled_drop_path=False)
    spare_unlabeled(spared, config).count = 4
    images = torch.randn(4, 3, 224, 224)
    logits = []
    for model in (plain, spared):
        torch.manual_seed(5)
        logits.append(model(images))
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_by_default_nothing_is_changed() -> None:
    model, config = noised("resnet18")
    before = [type(module) for module in model.modules()]
    spare_unlabeled(model, config)
    assert [type(module) for module in model.modules()] == before


def test_a_network_whose_dropout_is_not_known_is_refused() -> None:
    config = TrainConfig(model=ModelConfig(name="x", dropout=0.5), unlabeled_dropout=False)
    with pytest.raises(UserError, match="where this network has its dropout is not known"):
        spare_unlabeled(nn.Sequential(nn.Linear(3, 3)), config)
