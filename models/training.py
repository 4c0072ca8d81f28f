"""The one training loop: teacher, student and fine-tuning; one process or DDP ranks.

A global batch is cut into `train.replicas` micro-batches, each with its own batch-norm statistics and its own dropout
seed. Ranks divide the replicas and accumulate; gradients are averaged by DDP, batch-norm buffers by us. So the result
does not depend on how many ranks there were (bitwise for 2 replicas on 1 or 2 ranks, else to rounding).
"""

import os
import time
from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import checkpoints, losses, zoo
from models.configs import TrainConfig
from models.inference import forward_probabilities
from models.loader import (
    IndexedImages,
    PseudoLabels,
    ReplicaBatch,
    TrainingBatches,
    clean_batch,
    normalize,
    training_loader,
)
from models.replicas import ReplicaBuffers, WeightAverage
from models.schedule import ema_decay, learning_rate, total_steps
from models.worker import Stopped, Worker
from storage.artifacts import artifact_folder, get, publish_file
from storage.errors import StoreError, UserError
from storage.keys import digest
from storage.objects import Store
from storage.shards import write_parquet

RECORDS = 100  # rows of the history table, about
RESUME_ATTEMPTS = 5
VALIDATION_BATCH = 64


def train(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: train a network, resume where an attempt left off, publish its files.

    `spec`: store, key, attempt, config (TrainConfig), dataset (key), selection and labels (keys or ""), class_names,
    numerics, loader_workers, checkpoint_steps. Returns {"files": entries, "metrics": {...}} from rank 0.
    Raises UserError on a loss that is not finite, with the step; Stopped after a checkpoint when asked to stop.
    """
    torch.set_num_threads(worker.threads)
    if worker.world > 1:
        dist.init_process_group("nccl" if spec["numerics"]["device"] == "cuda" else "gloo")
    try:
        return Trainer(spec, worker).run()
    finally:
        if worker.world > 1:
            dist.destroy_process_group()


class Trainer:
    """The state of one training: network, optimizer, average, step, history."""

    def __init__(self, spec: dict[str, Any], worker: Worker) -> None:
        self.spec, self.worker = spec, worker
        self.store = Store(spec["store"])
        self.config = TrainConfig.model_validate(spec["config"])
        self.device = spec["numerics"]["device"]
        if self.device == "cuda":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(self.device)
        config, data = self.config, get(self.store, "dataset", spec["dataset"])
        self.labeled = IndexedImages(self.store, data, "labeled")
        self.validation = IndexedImages(self.store, data, "val")
        self.batches = self._batches()
        self.num_steps = total_steps(config, len(self.labeled))
        torch.manual_seed(config.seed)
        self.model = zoo.build(config.model, len(spec["class_names"]), config.bn_momentum).to(self.device)
        if spec["numerics"]["layout"] == "channels_last":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = _optimizer(self.model, config)
        self.average = WeightAverage(self.model)
        self.buffers = ReplicaBuffers(self.model, config.replicas, worker.world)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.ddp = DistributedDataParallel(self.model, broadcast_buffers=False) if worker.world > 1 else None

    def _batches(self) -> TrainingBatches:
        spec, store = self.spec, self.store
        unlabeled = pseudo = None
        if spec["selection"]:
            selection = get(store, "selection", spec["selection"])
            unlabeled = IndexedImages(store, selection, "train")
            labels = get(store, "labels", spec["labels"]) if spec["labels"] else None
            pseudo = PseudoLabels(store, selection, unlabeled, labels)
        per_rank = self.config.replicas // self.worker.world
        own = range(self.worker.rank * per_rank, (self.worker.rank + 1) * per_rank)
        return TrainingBatches(self.config, self.labeled, unlabeled, pseudo, own)

    def run(self) -> dict[str, Any]:
        """Train to the last step and publish."""
        resumed_at = self._resume()
        started, first = time.perf_counter(), self.step
        images_a_step = self.config.labeled_batch
        if self.spec["selection"]:
            images_a_step += self.config.replicas * self.config.replica_unlabeled
        loader = training_loader(self.batches, self.step, self.num_steps, self.spec["loader_workers"])
        record_steps = max(1, self.num_steps // RECORDS)
        validation_steps = max(1, self.num_steps // self.config.num_validations)
        for batch in loader:
            facts = self._train_step(batch)
            self.step += 1
            last = self.step == self.num_steps
            if self.step % validation_steps == 0 or last:
                facts["val_top1"] = self.validate()
            if self.step % record_steps == 0 or "val_top1" in facts:
                self._record(facts)
            self.worker.progress(self.step * images_a_step, self.num_steps * images_a_step, last=last)
            if self._stop_agreed():
                self._checkpoint()
                raise Stopped
            if self.step % self.spec["checkpoint_steps"] == 0 and not last:
                self._means(facts)  # a network that has diverged is no checkpoint
                self._checkpoint()
        seconds = time.perf_counter() - started
        facts = {
            "train_images_per_s": round((self.step - first) * images_a_step / seconds, 1) if self.step > first else 0.0
        }
        return self._publish({**facts, "resumed_at_step": resumed_at})

    def _train_step(self, batch: list[ReplicaBatch]) -> dict[str, Any]:
        """One optimizer step over this rank's replicas; tensors of the step's facts, not yet read from the device."""
        rate = learning_rate(self.config, self.step, len(self.labeled))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        sums: dict[str, torch.Tensor] = {}
        self.buffers.start_step()
        for number, part in enumerate(batch):
            self.buffers.start_replica()
            replica = self.worker.rank * len(batch) + number
            torch.manual_seed(int(digest([self.config.seed, self.step, replica])[:15], 16))
            wait = self.ddp is not None and number < len(batch) - 1
            with self.ddp.no_sync() if self.ddp is not None and wait else nullcontext():
                loss, facts = self._replica_loss(part)
                (loss / len(batch)).backward()
            self.buffers.end_replica()
            for name, value in facts.items():
                sums[name] = sums.get(name, 0) + value / len(batch)
        self.buffers.end_step()
        self.optimizer.step()
        self.average.update(self.model, ema_decay(self.config, self.step))
        return {**sums, "learning_rate": rate}

    def _replica_loss(self, batch: ReplicaBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, n = self.config, len(batch.labels)
        inputs = normalize(batch.images.to(self.device, non_blocking=True), config.model.mean, config.model.std)
        if self.spec["numerics"]["layout"] != "channels_last":
            inputs = inputs.contiguous()
        mixed = self.spec["numerics"]["dtype"] == "bfloat16"
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=mixed):
            logits = (self.ddp or self.model)(inputs)
        logits = logits.float()
        labels = batch.labels.to(self.device)
        labeled = losses.labeled_losses(logits[:n], labels, config)
        facts = {"loss_labeled": labeled.detach().mean()}
        if not len(batch.pseudo_labels):
            return losses.combine(labeled, None, config), facts
        pseudo = batch.pseudo_labels.to(self.device)
        unlabeled = losses.unlabeled_losses(logits[n:], pseudo, config)
        facts["loss_unlabeled"] = unlabeled.detach().mean()
        facts["agreement"] = (logits[n:].argmax(-1) == pseudo.argmax(-1)).float().mean()
        return losses.combine(labeled, unlabeled, config), facts

    def _record(self, facts: dict[str, Any]) -> None:
        """Append a row to the history."""
        epoch = self.step * self.config.labeled_batch / len(self.labeled)
        self.history.append({"step": float(self.step), "epoch": epoch, **self._means(facts)})

    def _means(self, facts: dict[str, Any]) -> dict[str, float]:
        """A step's facts as numbers, means over all ranks. Raises UserError where a loss is not finite."""
        row = {}
        for name, value in facts.items():
            if isinstance(value, torch.Tensor):
                value = value.clone()
                if self.worker.world > 1:
                    dist.all_reduce(value)
                value = (value / self.worker.world).item()
            row[name] = value
        if not row["loss_labeled"] < float("inf") or not row.get("loss_unlabeled", 0.0) < float("inf"):
            raise UserError(
                f"the loss is not finite at step {self.step} of {self.num_steps}; lower optimizer.lr_per_256 "
                f"(now {self.config.optimizer.lr_per_256}) or lengthen schedule.warmup_epochs"
            )
        return row

    @torch.inference_mode()
    def validate(self) -> float:
        """Top-1 of the weight average on the validation set, clean view, in [0, 1]; ranks share the images."""
        model = self.average.model
        model.eval()
        view = self.config.model.model_dump()
        correct, rows = 0, range(self.worker.rank, len(self.validation), self.worker.world)
        numerics = {**self.spec["numerics"], "device": self.device.split(":")[0]}
        for start in range(0, len(rows), VALIDATION_BATCH):
            some = rows[start : start + VALIDATION_BATCH]
            images = clean_batch(map(self.validation.image, some), view["image_size"], view["crop_pct"])
            predicted = forward_probabilities(model, images, view, numerics).argmax(axis=1)
            correct += int((predicted == self.validation.labels[list(some)]).sum())
        if self.worker.world > 1:
            total = torch.tensor([correct], device=self.device)
            dist.all_reduce(total)
            correct = int(total.item())
        return correct / len(self.validation)

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks agree in the same step."""
        if self.worker.world == 1:
            return self.worker.stop_requested
        flag = torch.tensor([float(self.worker.stop_requested)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _checkpoint(self) -> None:
        if self.worker.rank == 0:
            state = {
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "history": self.history,
            }
            checkpoints.save_checkpoint(self.store, self.spec["key"], self.spec["attempt"], self.step, state)

    def _resume(self) -> int:
        """Take up the most advanced whole checkpoint of any attempt; every rank takes the same. Returns its step."""
        state = self._agreed_checkpoint()
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.step = state["history"], state["step"]
        return self.step

    def _agreed_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint that all ranks could read; another attempt may delete its own between two looks."""
        for _ in range(RESUME_ATTEMPTS):
            state, found = None, [""]
            if self.worker.rank == 0:
                for path in checkpoints.list_checkpoints(self.store, self.spec["key"]):
                    state = checkpoints.load_checkpoint(self.store, path)
                    if state is not None:
                        found = [path]
                        break
            if self.worker.world == 1:
                return state
            dist.broadcast_object_list(found)
            if not found[0]:
                return None
            if self.worker.rank != 0:
                state = checkpoints.load_checkpoint(self.store, found[0])
            missing = torch.tensor([float(state is None)], device=self.device)
            dist.all_reduce(missing, op=dist.ReduceOp.MAX)
            if not missing.item():
                return state
        raise StoreError("checkpoints vanish as fast as they are listed; is the same training at work elsewhere?")

    def _publish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Rank 0 writes the weight average as the model, and the history. Both are files of the artifact."""
        if self.worker.rank != 0:
            return {}
        folder = artifact_folder("model", self.spec["key"])
        with self.store.staging() as staging:
            zoo.save(self.average.model, self.config.model, self.spec["class_names"], staging)
            write_parquet(staging / "history.parquet", history_table(self.history))
            names = (zoo.WEIGHTS_FILE, zoo.CONFIG_FILE, "history.parquet")
            files = [publish_file(self.store, folder, name, staging / name) for name in names]
        metrics = {
            "class_names": self.spec["class_names"],
            "num_steps": self.num_steps,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "val_top1": self.history[-1]["val_top1"],
            "final_loss_labeled": self.history[-1]["loss_labeled"],
        }
        return {"files": [f.model_dump() for f in files], "metrics": metrics, "facts": facts}


HISTORY_COLUMNS = ("step", "epoch", "learning_rate", "loss_labeled", "loss_unlabeled", "agreement", "val_top1")


def history_table(history: list[dict[str, float]]) -> pa.Table:
    """The training's history, one row a record; null where a value was not measured."""
    return pa.table({name: pa.array([row.get(name) for row in history], pa.float64()) for name in HISTORY_COLUMNS})


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
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
