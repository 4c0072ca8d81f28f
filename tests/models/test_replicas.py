"""Batch-norm buffers of replicas and the weight average, in numbers worked out by hand. Two ranks: test_training.py."""

import pytest
import torch
from torch import nn

from models.replicas import ReplicaBuffers, WeightAverage

MOMENTUM = 0.5
FIRST, SECOND = torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])  # means 1 and 6, variances 2 and 8


def norm() -> nn.BatchNorm1d:
    """Running mean 0 and variance 1."""
    return nn.BatchNorm1d(1, momentum=MOMENTUM).train()


def step(model: nn.BatchNorm1d, buffers: ReplicaBuffers, parts: list[torch.Tensor]) -> None:
    buffers.start_step()
    for part in parts:
        buffers.start_replica()
        model(part)
        buffers.end_replica()
    buffers.end_step()


def same(first: nn.Module, second: nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


def test_running_statistics_are_the_mean_of_what_each_replica_ends_with() -> None:
    model = norm()
    step(model, ReplicaBuffers(model, replicas=2, world=1), [FIRST, SECOND])
    assert model.running_mean is not None
    assert model.running_var is not None
    assert model.running_mean.item() == pytest.approx((0.5 * 1 + 0.5 * 6) / 2)
    assert model.running_var.item() == pytest.approx(((0.5 + 0.5 * 2) + (0.5 + 0.5 * 8)) / 2)


def test_the_order_of_replicas_does_not_matter_and_the_next_step_starts_from_the_mean() -> None:
    models = norm(), norm()
    for model, parts in zip(models, ([FIRST, SECOND], [SECOND, FIRST]), strict=True):
        buffers = ReplicaBuffers(model, replicas=2, world=1)
        step(model, buffers, parts)
        step(model, buffers, parts)
    assert models[0].running_mean is not None
    assert models[0].running_mean.item() == pytest.approx(0.5 * 1.75 + 0.5 * 3.5)
    assert same(*models)


def test_one_replica_updates_as_plain_batch_norm_does() -> None:
    subject, plain = norm(), norm()
    step(subject, ReplicaBuffers(subject, replicas=1, world=1), [FIRST])
    plain(FIRST)
    assert same(subject, plain)


def test_a_step_counts_as_one_batch_however_many_replicas_a_rank_has() -> None:
    """`num_batches_tracked` is in the published file: counted per replica it would differ by the number of ranks."""
    model = norm()
    buffers = ReplicaBuffers(model, replicas=2, world=1)
    step(model, buffers, [FIRST, SECOND])
    step(model, buffers, [FIRST, SECOND])
    assert model.num_batches_tracked is not None
    assert model.num_batches_tracked.item() == 2


def test_a_network_without_buffers_needs_nothing() -> None:
    model = nn.Linear(1, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = ReplicaBuffers(model, replicas=2, world=1)
    buffers.start_step()
    buffers.start_replica()
    buffers.end_replica()
    buffers.end_step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_average_is_decay_times_old_plus_the_rest_times_new() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    average = WeightAverage(model)
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[1].running_mean.fill_(10.0)
        model[1].num_batches_tracked.fill_(7)
    average.update(model, 0.75)
    state = average.model.state_dict()
    assert state["0.weight"].item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert state["1.running_mean"].item() == pytest.approx(0.75 * 0 + 0.25 * 10)
    assert state["1.num_batches_tracked"].item() == 7
    average.update(model, 0.75)
    assert average.model.state_dict()["0.weight"].item() == pytest.approx(0.75 * 1.5 + 0.25 * 3)


def test_the_average_shares_nothing_with_the_model_and_is_not_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    average = WeightAverage(model)
    before = average.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(average.model[0].weight, before)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert not average.model.training
    assert model.training
