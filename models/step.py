"""One optimizer step: forward and backward over this rank's replicas, all-reduce, clipping, update, weight average."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import losses
from models.configs import TrainConfig
from models.initial import freeze_shallow
from models.loader import ReplicaBatch, normalize
from models.part_noise import spare_unlabeled
from models.precision import autocast
from models.replicas import ReplicaBuffers, WeightAverage
from models.schedule import ema_decay, learning_rate
from storage.errors import UserError
from storage.keys import digest

NEVER = 1 << 62  # a step that no training reaches


class TrainStep:
    """A network in training and what a step changes: optimizer, weight average, loss scale.

    Calling it does step `step` (from 0) on this rank's replicas and returns the step's facts as tensors that were not
    read from the device yet: loss_labeled, loss_unlabeled, agreement, learning_rate.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        numerics: dict[str, Any],
        num_labeled: int,
        device: str = "cpu",
        rank: int = 0,
        world: int = 1,
        teacher: nn.Module | None = None,
    ) -> None:
        self._config, self._numerics, self._num_labeled = config, numerics, num_labeled
        self._device, self._rank = device, rank
        self.rows = spare_unlabeled(model, config)
        if config.batch_norm == "synchronized" and world > 1:
            model = convert_sync_batchnorm(model)
        self.model = self._placed(model)
        self._frozen = freeze_shallow(self.model, config.frozen_layers)
        self.teacher = self._placed(teacher).eval() if teacher is not None else None
        self.optimizer = build_optimizer(self.model, config)
        self.average = WeightAverage(self.model)
        self._buffers = ReplicaBuffers(self.model, config.replicas, world)
        self._scaler = torch.amp.GradScaler(device.split(":")[0], enabled=numerics["dtype"] == "float16")
        self._forward: nn.Module = compiled(self.model) if numerics["compile"] else self.model
        self._ddp = DistributedDataParallel(self._forward, broadcast_buffers=False) if world > 1 else None
        self.first_bad = torch.tensor(NEVER, device=device)

    def __call__(self, batch: list[ReplicaBatch], step: int) -> dict[str, Any]:
        """Do step `step` on this rank's replicas; see the class."""
        rate = learning_rate(self._config, step, self._num_labeled)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        for module in self._frozen:
            module.eval()
        sums: dict[str, torch.Tensor] = {}
        self._buffers.start_step()
        for number, part in enumerate(batch):
            self._buffers.start_replica()
            replica = self._rank * len(batch) + number
            torch.manual_seed(int(digest([self._config.seed, step, replica])[:15], 16))
            wait = self._ddp is not None and number < len(batch) - 1
            with self._ddp.no_sync() if self._ddp is not None and wait else nullcontext():
                loss, facts = self._replica_loss(part)
                self._scaler.scale(loss / len(batch)).backward()
            bad = ~torch.isfinite(loss.detach()) & (self.first_bad == NEVER)
            self.first_bad = torch.where(bad, step + 1, self.first_bad)
            self._buffers.end_replica()
            for name, value in facts.items():
                sums[name] = sums.get(name, 0) + value / len(batch)
        self._buffers.end_step()
        if self._config.clip_norm:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.average.update(self.model, ema_decay(self._config, step))
        return {**sums, "learning_rate": rate}

    def first_not_finite(self) -> int | None:
        """The first step, from 1, whose loss was not finite on any rank; None where all were. Ranks call it together."""
        found = self.first_bad.clone()
        if self._ddp is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MIN)
        step = int(found.item())
        return None if step == NEVER else step

    def is_finite(self) -> bool:
        """Whether all weights and statistics are; they may be lost a step before the loss shows it."""
        return all(bool(torch.isfinite(t).all()) for t in self.model.state_dict().values() if t.is_floating_point())

    def state(self) -> dict[str, Any]:
        """All that a resume needs."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _placed(self, model: nn.Module) -> nn.Module:
        model = model.to(self._device)
        return model.to(memory_format=torch.channels_last) if self._numerics["layout"] == "channels_last" else model

    def _logits(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, size, size, 3] anywhere -> float32 [n, classes] on the device."""
        own = self._config.model
        inputs = normalize(images.to(self._device, non_blocking=True), own.mean, own.std)
        if self._numerics["layout"] != "channels_last":
            inputs = inputs.contiguous()
        with autocast(self._numerics, self._device):
            logits: torch.Tensor = model(inputs)
        return logits.float()

    def _pseudo_labels(self, batch: ReplicaBatch) -> torch.Tensor:
        """Of the unlabeled images, float32 [m, classes]: stored ones, or what the un-noised teacher predicts now."""
        if self.teacher is None:
            return batch.pseudo_labels.to(self._device, non_blocking=True)
        with torch.no_grad():
            return self._logits(self.teacher, batch.clean).softmax(dim=-1)

    def _replica_loss(self, batch: ReplicaBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, n = self._config, len(batch.labels)
        self.rows.count = n
        logits = self._logits(self._ddp or self._forward, batch.images)
        facts: dict[str, torch.Tensor] = {}
        labeled = unlabeled = None
        if n:
            labels = batch.labels.to(self._device, non_blocking=True)
            labeled = losses.labeled_losses(logits[:n], labels, config)
            facts["loss_labeled"] = labeled.detach().mean()
        if len(logits) > n:
            pseudo = self._pseudo_labels(batch)
            unlabeled = losses.unlabeled_losses(logits[n:], pseudo, config)
            facts["loss_unlabeled"] = unlabeled.detach().mean()
            facts["agreement"] = (logits[n:].argmax(-1) == pseudo.argmax(-1)).float().mean()
        return losses.combine(labeled, unlabeled, config), facts


def compiled(model: nn.Module) -> nn.Module:
    """The network compiled for batches of a constant size; its weights stay those of `model`."""
    from torch._inductor import config as inductor

    inductor.compile_threads = 1  # a pool of compiling processes would outlive a child that is killed
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimizer over the parameters that are trained; biases and norms do not decay. Raises UserError."""
    settings = config.optimizer
    arguments: dict[str, Any] = {"opt": settings.name, "lr": settings.lr_per_256, "weight_decay": settings.weight_decay}
    if "rmsprop" in settings.name:
        arguments.update(momentum=settings.momentum, eps=settings.eps, alpha=settings.decay)
    elif settings.name in ("sgd", "nesterov", "momentum"):
        arguments.update(momentum=settings.momentum)
    try:
        return create_optimizer_v2(model, **arguments)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"optimizer.name={settings.name}: timm cannot build it ({error})") from error
