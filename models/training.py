"""The one training loop: teacher, student and fine-tuning; one process or DDP ranks.

A global batch is cut into `train.replicas` micro-batches, each with its own batch-norm statistics and its own dropout
seed. Ranks divide the replicas and accumulate; gradients are averaged by DDP, batch-norm buffers by us. So the result
does not depend on how many ranks there were (bitwise for 2 replicas on 1 or 2 ranks, else to rounding).
"""

import copy
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn

from models import checkpoints, probe, zoo
from models.classifier import load_model
from models.compute import ComputeConfig, loader_processes
from models.configs import TrainConfig
from models.inference import forward_probabilities
from models.initial import load_model_state, load_pretrained
from models.loader import CleanView, IndexedImages, TrainingBatches, clean_batch, training_loader
from models.memory import keep_freed_memory
from models.numerics import training_choices
from models.precision import computes_in_bfloat16, has_compiler
from models.pretrained import locate
from models.pseudo_labels import PseudoLabels
from models.schedule import total_steps
from models.step import TrainStep
from models.trackers import open_trackers
from models.worker import Stopped, Worker
from storage.artifacts import Manifest, agree_numerics, artifact_folder, get, publish_file
from storage.errors import StoreError, UserError
from storage.objects import Store
from storage.shards import write_parquet

RECORDS = 100  # rows of the history table, about
RESUME_ATTEMPTS = 5
SHARE_OF_SAVING = 50  # a checkpoint waits so many times as long as the last one took
VALIDATION_BATCH = 64
RANKS_WAIT = timedelta(hours=2)  # for each other: rank 0 may be measuring which numerics are fastest


def train(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: train a network, resume where an attempt left off, publish its files.

    `spec`: store, key, attempt, name, config (TrainConfig), dataset (key), selection, labels, teacher and initial (keys
    or ""), source (fingerprint of pretrained weights or ""), class_names, device, numerics (None: to be measured), compute
    (ComputeConfig), log_folder. Returns {"files": entries, "metrics": {...}, "facts": {...}} from rank 0. Raises
    UserError on a loss that is not finite, with the step; Stopped after a checkpoint when asked to stop.
    """
    torch.set_num_threads(worker.threads)
    keep_freed_memory()
    if worker.world > 1:
        dist.init_process_group("nccl" if spec["device"] == "cuda" else "gloo", timeout=RANKS_WAIT)
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
        self.compute = ComputeConfig.model_validate(spec["compute"])
        self.device = "cpu"
        if spec["device"] == "cuda":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(self.device)
        config, data = self.config, get(self.store, "dataset", spec["dataset"])
        self.labeled = IndexedImages(self.store, data, "labeled")
        self.validation = IndexedImages(self.store, data, "val")
        teacher = get(self.store, "model", spec["teacher"]) if spec.get("teacher") else None
        self.online = clean_view_of(teacher) if teacher is not None else None
        self.batches = self._batches()
        self.num_steps = total_steps(config, len(self.labeled))
        network = self._network()
        self.numerics = spec["numerics"] or self._agreed_numerics(network, teacher)
        online = load_model(self.store, teacher) if teacher is not None else None
        self.advance = self._step(network, self.numerics, worker.world, online)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"top1": -1.0, "step": 0, "state": None}
        self.last_checkpoint = ""
        self.saved_at, self.saving_s = time.perf_counter(), 0.0
        self.images_a_step = self.batches.images_a_step

    def _batches(self) -> TrainingBatches:
        spec, store = self.spec, self.store
        unlabeled = pseudo = None
        if spec["selection"]:
            selection = get(store, "selection", spec["selection"])
            unlabeled = IndexedImages(store, selection, "train")
            if self.online is None:
                labels = get(store, "labels", spec["labels"]) if spec["labels"] else None
                pseudo = PseudoLabels(store, selection, unlabeled, labels)
        own = range(self.worker.rank * self._own_replicas, (self.worker.rank + 1) * self._own_replicas)
        return TrainingBatches(self.config, self.labeled, unlabeled, pseudo, own, self.online)

    @property
    def _own_replicas(self) -> int:
        return self.config.replicas // self.worker.world

    def _network(self) -> nn.Module:
        """The network with its first weights, on the CPU; the same on every rank."""
        config, spec = self.config, self.spec
        torch.manual_seed(config.seed)
        model = zoo.build(config.model, len(spec["class_names"]), config.bn_momentum)
        if config.pretrained:
            found = locate(config.pretrained)
            if spec["source"] and found.fingerprint() != spec["source"]:
                raise UserError(
                    f"pretrained={config.pretrained}: the weights have changed since the run began; run again"
                )
            load_pretrained(model, found, config.model, as_it_is=config.epochs == 0)
        if spec.get("initial"):
            initial = get(self.store, "model", spec["initial"])
            load_model_state(model, load_model(self.store, initial).state_dict(), f"init=model ({initial.key})")
        return model

    def _step(self, network: nn.Module, numerics: dict[str, Any], world: int, teacher: nn.Module | None) -> TrainStep:
        return TrainStep(
            self.config, network, numerics, len(self.labeled), self.device, self.worker.rank, world, teacher
        )

    def _agreed_numerics(self, network: nn.Module, teacher: Manifest | None) -> dict[str, Any]:
        """What rank 0 found fastest, or an earlier attempt did; published, and the same on every rank."""
        agreed: list[Any] = [None]
        if self.worker.rank == 0:
            student, classes = bool(self.spec["selection"]), len(self.spec["class_names"])
            batch = probe.made_up_batch(self.config, classes, student, self.online, self._own_replicas)
            online = load_model(self.store, teacher) if teacher is not None else None
            chosen = probe.choose(
                training_choices(self.compute, computes_in_bfloat16(self.device.split(":")[0]), has_compiler()),
                lambda numerics: self._step(copy.deepcopy(network), numerics, 1, copy.deepcopy(online)),
                batch,
                self.num_steps,
            )
            agreed = [agree_numerics(self.store, "model", self.spec["key"], chosen)]
        if self.worker.world > 1:
            dist.broadcast_object_list(agreed)
        found: dict[str, Any] = agreed[0]
        return found

    def run(self) -> dict[str, Any]:
        """Train to the last step and publish."""
        resumed_at = self._resume()
        self.saved_at = started = time.perf_counter()
        first = self.step
        trackers = []
        if self.worker.rank == 0:
            folder, config = Path(self.spec["log_folder"]), self.spec["config"]
            trackers = open_trackers(self.compute.trackers, self.spec["name"], folder, self.step, config)
        try:
            self._train(trackers)
        finally:
            for tracker in trackers:
                tracker.close()
        if not self.history:  # pretrained weights as they are
            self._record({"val_top1": self.validate()})
        seconds = time.perf_counter() - started
        images = (self.step - first) * self.images_a_step
        facts = {"train_images_per_s": round(images / seconds, 1) if images else 0.0, "numerics": self.numerics}
        return self._publish({**facts, "resumed_at_step": resumed_at})

    def _train(self, trackers: list[Any]) -> None:
        """Do the steps that are left."""
        record_steps = self.config.record_steps or max(1, self.num_steps // RECORDS)
        validation_steps = max(1, self.num_steps // self.config.num_validations)
        shown, since = dict[str, Any](), (time.perf_counter(), self.step)
        workers = loader_processes(self.compute, self.spec["device"])
        for batch in training_loader(self.batches, self.step, self.num_steps, workers):
            self.worker.place = f"step {self.step + 1} of {self.num_steps}"
            facts = self.advance(batch, self.step)
            self.step += 1
            last = self.step == self.num_steps
            if self.step % validation_steps == 0 or last:
                facts["val_top1"] = self._validated()
            if self.step % record_steps == 0 or "val_top1" in facts:
                row = self._record(facts)
                now = time.perf_counter()
                rate = (self.step - since[1]) * self.images_a_step / (now - since[0])
                since = (now, self.step)
                for tracker in trackers:
                    tracker.log(self.step, {**row, "images_per_s": rate})
                shown = {**shown, **{name: value for name, value in row.items() if name not in ("step", "epoch")}}
            done, total = self.step * self.images_a_step, self.num_steps * self.images_a_step
            self.worker.progress(done, total, last=last, **shown)
            stop, due = self._agreed()
            if stop:
                self._checkpoint()
                raise Stopped
            if (due or self.step % self.compute.checkpoint_steps == 0) and not last:
                self._checkpoint()

    def _record(self, facts: dict[str, Any]) -> dict[str, float]:
        """Append a row to the history: a step's facts as numbers, means over all ranks. Returns it."""
        self._check_finite()
        row: dict[str, float] = {
            "step": float(self.step),
            "epoch": self.step * self.config.labeled_batch / len(self.labeled),
        }
        for name, value in facts.items():
            if isinstance(value, torch.Tensor):
                value = value.clone()
                if self.worker.world > 1:
                    dist.all_reduce(value)
                value = (value / self.worker.world).item()
            row[name] = value
        self.history.append(row)
        return row

    def _check_finite(self) -> None:
        """Raise UserError where the loss of a step was not finite, naming it and the last good checkpoint."""
        step = self.advance.first_not_finite()
        if step is not None:
            raise self._diverged(f"the loss is not finite at step {step}")

    def _diverged(self, what: str) -> UserError:
        kept = f"its last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "it has no checkpoint"
        return UserError(
            f"{what} of {self.num_steps}; {kept}. Lower optimizer.lr_per_256 (now {self.config.optimizer.lr_per_256}), "
            "lengthen schedule.warmup_epochs or set clip_norm"
        )

    def _validated(self) -> float:
        """Measure the average; keep a copy of the best where that is what will be published."""
        top1 = self.validate()
        if self.config.keep == "best" and top1 > self.best["top1"]:
            state = {name: tensor.clone() for name, tensor in self.advance.average.model.state_dict().items()}
            self.best = {"top1": top1, "step": self.step, "state": state}
        return top1

    @torch.inference_mode()
    def validate(self) -> float:
        """Top-1 of the weight average on the validation set, clean view, in [0, 1]; ranks share the images."""
        model = self.advance.average.model
        model.eval()
        view = self.config.model.model_dump()
        correct, rows = 0, range(self.worker.rank, len(self.validation), self.worker.world)
        numerics = {**self.numerics, "device": self.device.split(":")[0]}
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

    def _agreed(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether a checkpoint is due by rank 0's clock; the same on all ranks."""
        waits = max(self.compute.checkpoint_seconds, SHARE_OF_SAVING * self.saving_s)
        due = self.worker.rank == 0 and time.perf_counter() - self.saved_at > waits
        if self.worker.world == 1:
            return self.worker.stop_requested, due
        flags = torch.tensor([float(self.worker.stop_requested), float(due)], device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, agreed = flags.tolist()
        return bool(stop), bool(agreed)

    def _checkpoint(self) -> None:
        """Save what a resume needs. A network that has diverged is no checkpoint: raises as `_check_finite` does."""
        self._check_finite()
        if not self.advance.is_finite():  # often a step before the loss shows it
            raise self._diverged(f"weights are not finite after step {self.step}")
        if self.worker.rank == 0:
            begun = time.perf_counter()
            state = {"step": self.step, "history": self.history, "best": self.best, **self.advance.state()}
            spec = self.spec
            self.last_checkpoint = checkpoints.save_checkpoint(
                self.store, spec["key"], spec["attempt"], self.step, state, self.compute.kept_checkpoints
            )
            self.saved_at = time.perf_counter()
            self.saving_s = self.saved_at - begun

    def _resume(self) -> int:
        """Take up the most advanced whole checkpoint of any attempt; every rank takes the same. Returns its step."""
        state = self._agreed_checkpoint()
        if state is None:
            return 0
        self.advance.load(state)
        self.history, self.step, self.best = state["history"], state["step"], state["best"]
        return self.step

    def _agreed_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint that all ranks could read; another attempt may delete its own between two looks."""
        for _ in range(RESUME_ATTEMPTS):
            state, found = None, [""]
            if self.worker.rank == 0:
                for path in checkpoints.list_checkpoints(self.store, self.spec["key"]):
                    state = checkpoints.load_checkpoint(self.store, path)
                    if state is not None:
                        found, self.last_checkpoint = [path], path
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
        folder, model = artifact_folder("model", self.spec["key"]), self.advance.average.model
        top1 = self.history[-1]["val_top1"]
        if self.best["state"] is not None:
            model.load_state_dict(self.best["state"])
            top1 = self.best["top1"]
        with self.store.staging() as staging:
            zoo.save(model, self.config.model, self.spec["class_names"], staging)
            write_parquet(staging / "history.parquet", history_table(self.history))
            names = (zoo.WEIGHTS_FILE, zoo.CONFIG_FILE, "history.parquet")
            files = [publish_file(self.store, folder, name, staging / name) for name in names]
        metrics = {
            "class_names": self.spec["class_names"],
            "num_steps": self.num_steps,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "val_top1": top1,
        }
        if self.config.keep == "best":
            metrics["best_step"] = self.best["step"]
        for name in ("loss_labeled", "loss_unlabeled"):
            if name in self.history[-1]:
                metrics[f"final_{name}"] = self.history[-1][name]
        return {"files": [f.model_dump() for f in files], "metrics": metrics, "facts": facts}


HISTORY_COLUMNS = ("step", "epoch", "learning_rate", "loss_labeled", "loss_unlabeled", "agreement", "val_top1")


def history_table(history: list[dict[str, float]]) -> pa.Table:
    """The training's history, one row a record; null where a value was not measured."""
    return pa.table({name: pa.array([row.get(name) for row in history], pa.float64()) for name in HISTORY_COLUMNS})


def clean_view_of(model: Manifest) -> CleanView:
    """The un-noised view of a trained network."""
    own = TrainConfig.model_validate(model.config).model
    return CleanView(own.image_size, own.crop_pct)
