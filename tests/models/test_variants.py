"""Networks of ours under timm's names: what they are, and that they come back from their files as themselves."""

from pathlib import Path

import timm
import torch

from models import variants, zoo
from models.configs import SMALL_IMAGE_NETWORKS, ModelConfig

SVHN = ModelConfig(name=variants.efficientnet_b0_svhn.__name__, image_size=32, dropout=0.2, drop_path=0.2)

SMALLER = {"layers": [1, 1, 1], "channels": [16, 32, 64]}
WIDE = ModelConfig(name=variants.wide_resnet28_2.__name__, image_size=32, args=SMALLER, drop_path=0.1)


def test_the_settings_name_every_network_that_timm_lacks() -> None:
    assert set(timm.list_models(module="variants")) == set(SMALL_IMAGE_NETWORKS)


def test_the_svhn_network_ends_in_a_map_of_4_x_4_and_has_b0s_weights() -> None:
    model, plain = (timm.create_model(name, num_classes=10).eval() for name in (SVHN.name, "tf_efficientnet_b0"))
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)
    assert plain.forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (1, 1)
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (model, plain)]
    assert shapes[0] == shapes[1]
    strides = [stage[0].conv_dw.stride[0] for stage in model.blocks]
    assert strides == [1, 1, 1, 2, 1, 2, 1]
    assert [info["reduction"] for info in model.feature_info] == [2, 2, 2, 4, 8]


def test_the_wide_resnet_has_the_published_size_and_ends_in_a_map_of_8_x_8() -> None:
    """1.5 million weights is what the comparisons on CIFAR-10 state for WRN-28-2; of the three stages two halve."""
    model = timm.create_model(WIDE.name, num_classes=10).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_467_610
    maps = timm.create_model(WIDE.name, features_only=True)(torch.zeros(1, 3, 32, 32))
    assert [tuple(found.shape[1:]) for found in maps] == [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]
    assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4]


def test_a_smaller_wide_resnet_reloads_as_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.build(WIDE, 10).eval()
    zoo.save(model, WIDE, list("0123456789"), tmp_path)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(image), model(image))


def test_the_svhn_network_reloads_as_itself_and_not_as_the_plain_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.build(SVHN, 10).eval()
    zoo.save(model, SVHN, list("0123456789"), tmp_path)
    image = torch.randn(2, 3, 32, 32)
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    plain = timm.create_model("tf_efficientnet_b0", num_classes=10, checkpoint_path=tmp_path / zoo.WEIGHTS_FILE).eval()
    with torch.no_grad():
        logits = model(image)
        assert torch.equal(reloaded(image), logits)
        assert (plain(image) - logits).abs().max() > 0.1 * logits.abs().max()
