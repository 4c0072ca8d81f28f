"""What replicas need beyond DDP: batch-norm buffers averaged over them, and the weight average (EMA)."""

import copy

import torch
import torch.distributed as dist
from torch import nn


class ReplicaBuffers:
    """Lets each replica of a step start from the same batch-norm buffers, and averages what they end with.

    Without it a rank with two replicas would update its running statistics twice, and two ranks would drift apart.
    """

    def __init__(self, model: nn.Module, replicas: int, world: int) -> None:
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._counters = [b for b in model.buffers() if not b.is_floating_point()]
        self._replicas, self._world = replicas, world
        self._trivial = replicas == 1 or not self._buffers
        self._before: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []

    def start_step(self) -> None:
        """Remember the buffers that every replica starts from."""
        if not self._trivial:
            self._before = [b.clone() for b in self._buffers]
            self._counts = [c.clone() for c in self._counters]
            self._sums = []

    def start_replica(self) -> None:
        """Set the buffers back to the step's start."""
        if not self._trivial and self._sums:
            torch._foreach_copy_(self._buffers, self._before)
            for counter, count in zip(self._counters, self._counts, strict=True):  # a step is one batch on any rank
                counter.copy_(count)

    def end_replica(self) -> None:
        """Add up what this replica ended with."""
        if self._trivial:
            return
        if self._sums:
            torch._foreach_add_(self._sums, self._buffers)
        else:
            self._sums = [b.clone() for b in self._buffers]

    def end_step(self) -> None:
        """Set the buffers to the mean over all replicas of all ranks."""
        if self._trivial:
            return
        flat = torch.cat([s.reshape(-1) for s in self._sums])
        if self._world > 1:
            dist.all_reduce(flat)
        flat /= self._replicas
        for buffer, piece in zip(self._buffers, flat.split([b.numel() for b in self._buffers]), strict=True):
            buffer.copy_(piece.view_as(buffer))


class WeightAverage:
    """The exponential moving average of parameters and float buffers; other buffers are copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """average = decay x average + (1 - decay) x model."""
        own, new = self.model.state_dict(), model.state_dict()
        floats = [name for name, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floats], [new[name] for name in floats], 1.0 - decay)
        for name in own.keys() - set(floats):
            own[name].copy_(new[name])
