"""A network prepared for bfloat16 is the same network, and closer to float32 than a plain cast."""

import copy
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.bfloat16 import fold_batch_norm, prepare, round_keeping_sums
from models.decode import clean_pixels, decode_pixels
from tests.lite0 import lite0

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos.parquet"


def with_statistics(model: nn.Module, image_size: int = 32) -> nn.Module:
    """Batch norms with statistics and scales that are not a fresh network's."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            model(torch.randn(8, 3, image_size, image_size))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "norms"), [("efficientnet_b0", 49), ("resnet18", 20), ("mobilenetv3_small_050", 34), ("vgg11_bn", 8)]
)
def test_folding_changes_no_network(name: str, norms: int) -> None:
    model = with_statistics(timm.create_model(name, num_classes=10))
    probe = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        before = model(probe)
    assert fold_batch_norm(model, 32) == norms
    with torch.inference_mode():
        assert model(probe) == pytest.approx(before, abs=1e-3 * before.abs().max().item())


def test_a_network_without_batch_norm_is_left_alone() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10).eval()
    before = copy.deepcopy(model.state_dict())
    assert fold_batch_norm(model, 32) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class UsedTwice(nn.Module):
    """The convolution's output is normalized, and also used as it is: folding would change the second use."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.convolution(images)
        return (self.norm(found) + found).mean(dim=(2, 3))


def test_a_network_that_folding_would_change_is_put_back() -> None:
    model = with_statistics(UsedTwice())
    before = copy.deepcopy(model.state_dict())
    assert fold_batch_norm(model, 32) == 0
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@settings(max_examples=50, deadline=None)
@given(
    filters=st.integers(1, 5),
    size=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_rounded_weights_are_neighbors_in_bfloat16_and_keep_their_sums(
    filters: int, size: int, seed: int, scale: float
) -> None:
    weight = torch.randn(filters, size, generator=torch.Generator().manual_seed(seed)) * scale
    rounded = round_keeping_sums(weight)
    nearest = weight.to(torch.bfloat16).float()
    assert torch.equal(rounded, rounded.to(torch.bfloat16).float()), "not a value of bfloat16"
    assert ((rounded - weight).abs() <= weight.abs() * 2.0**-7).all(), "further away than a neighbor"
    error, plain = ((w.double() - weight.double()).sum(dim=1).abs() for w in (rounded, nearest))
    assert (error <= plain).all()


def test_the_sum_of_a_depthwise_filter_errs_several_times_less() -> None:
    weight = torch.randn(500, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    error, plain = (
        (w.double() - weight.double()).flatten(1).sum(dim=1).abs().mean()
        for w in (round_keeping_sums(weight), weight.to(torch.bfloat16).float())
    )
    assert error < plain / 3


@pytest.mark.skipif(not PHOTOS.is_file(), reason=f"{PHOTOS} is not there: photographs of the development data")
def test_of_photographs_nearly_all_get_the_class_of_float32() -> None:
    """EfficientNet-Lite0 with its ImageNet weights, 200 photographs; a plain cast: 98.5 % and 0.0090."""
    data = [row["bytes"] for row in pq.read_table(PHOTOS)["image"].to_pylist()]
    images = torch.stack([clean_pixels(decode_pixels(bytes(jpeg)), 224, 0.875) for jpeg in data])
    images = (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    exact, prepared = lite0(), prepare(lite0(), 224).to(memory_format=torch.channels_last)

    def predict(model: nn.Module, mixed: bool) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            return torch.cat([model(part).float() for part in images.split(20)]).softmax(-1).numpy()

    expected, found = predict(exact, False), predict(prepared, True)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.99
    assert np.abs(found.max(axis=1) - expected.max(axis=1)).mean() < 0.006
