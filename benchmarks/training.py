"""Training on photographs on this machine, tars to optimizer steps, against timm's train.py loop and the bare step.

python -m benchmarks.training [--model efficientnet_b0] [--size 224] [--batch 50] [--pairs 7] [--seconds 25] [--device cpu]

Before the pairs the program's own probe chooses dtype, layout and compilation once, as it does for a long training, and
all combinations of timm's flags are tried (bfloat16 where the hardware computes in it). Then timm with its defaults
(eager, float32), timm with its best flags, our training (loader, noise, steps, weight average), and our step fed with
tensors that lie ready are set up, each in a process of its own, and take turns, one after the other. Same network, photographs, batch,
RMSProp; timm's RandAugment is rand-m9-mstd0.5, which runs each of two operations with probability 0.5, ours always runs
both. What a process needs to start and to compile is left out and printed. Prints medians, spread and ratios pair by pair. Exits with an error where an aim is missed.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.turns import Contender, run, turns_of
from models.memory import keep_freed_memory

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos.parquet"
FLAGS = ("cl", "compile", "bf16")  # of timm: --channels-last, --torchcompile, --amp --amp-dtype bfloat16
AIMS = {"timm's defaults": 1.8, "timm's best flags": 1.0, "the bare step": 0.9}
OURS = "ours"
TRAINING, BARE, TIMM = (f"benchmarks.training:{name}" for name in ("our_training", "bare_steps", "timm_steps"))
RANKS_AIM = 0.9
TWO = ("two replicas, one process", "two replicas, two processes")
WARM_STEPS = 10  # of a turn: a loader has eight batches ready when it wakes
NUM_CLASSES = 200  # of ImageNet's have a photograph
COPIES = 15  # of each photograph in our data set: more decoded pixels than a loader keeps, so each is decoded anew
LONG_EPOCHS = 350


def write_data(folder: Path, photos: Path) -> None:
    """Class folders for timm; Parquet files for us, the photographs 15 times over and other names."""
    rows = [(image, number) for number, image in enumerate(pq.read_table(photos)["image"].to_pylist())]
    for copy in range(COPIES):
        for number, (image, label) in enumerate(rows):
            place = folder / "timm" / f"{label:04d}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{copy}-{number}.jpg").write_bytes(image["bytes"])
    images = [
        {"bytes": image["bytes"], "path": f"{copy}-{n}.jpg"}
        for copy in range(COPIES)
        for n, (image, _) in enumerate(rows)
    ]
    labels = [label for _ in range(COPIES) for _, label in rows]
    splits = {"labeled": (images, labels), "val": (images[:50], labels[:50]), "test": (images[50:100], labels[50:100])}
    (folder / "ours").mkdir()
    for split, (kept, own) in splits.items():
        pq.write_table(
            pa.table({"image": kept, "label": pa.array(own, pa.int64())}), folder / "ours" / f"{split}.parquet"
        )


def prepare(folder: Path) -> str:
    """The data set's key in the store `folder`/store."""
    from models.compute import ComputeConfig, LocalEngine
    from storage.artifacts import Manifest, commit
    from storage.objects import Store
    from tasks.contract import StageContext
    from tasks.prepare import PrepareConfig, prepare

    store, compute = Store(str(folder / "store")), ComputeConfig()
    config = PrepareConfig(root=str(folder / "ours"), min_images_per_class=1)
    context = StageContext(store, "0" * 32, LocalEngine(compute), compute)
    made = prepare(context, config, {})
    commit(
        store,
        Manifest(
            kind="dataset",
            key=context.key,
            stage="prepare",
            stage_version=1,
            config={},
            inputs={},
            files=made.files,
            metrics=made.metrics,
        ),
    )
    return context.key


def spec(
    options: argparse.Namespace, folder: Path, dataset: str, numerics: dict[str, Any] | None, ranks: int, replicas: int
) -> dict[str, Any]:
    """The spec of a long training, as tasks/train.py makes it."""

    from models.compute import ComputeConfig
    from models.configs import TrainConfig

    config = TrainConfig.model_validate(
        {
            "model": {"name": options.model, "image_size": options.size},
            "epochs": LONG_EPOCHS,
            "labeled_batch": options.batch,
            "replicas": replicas,
            "optimizer": {"lr_per_256": 1e-4 * 256 / options.batch},
            "num_validations": 1,
            "noise": {"magnitude": 9},
        }
    )
    return {
        "store": str(folder / "store"),
        "key": uuid.uuid4().hex,
        "attempt": "first",
        "name": "benchmark",
        "config": config.model_dump(mode="json"),
        "dataset": dataset,
        **dict.fromkeys(("selection", "labels", "teacher", "initial", "source", "log_folder"), ""),
        "class_names": [f"class {number}" for number in range(NUM_CLASSES)],
        "device": options.device,
        "numerics": numerics,
        "compute": ComputeConfig(ranks=ranks, checkpoint_steps=10**9, checkpoint_seconds=1e9, trackers=()).model_dump(
            mode="json"
        ),
    }


def our_training(job: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: the program's own training, loader and all."""
    from models.training import train
    from models.worker import Stopped

    turns, seen = turns_of(job), [0]

    def progress(done: int, total: int, unit: str = "images", last: bool = False, **facts: Any) -> None:
        if worker.rank == 0:  # which the others wait for
            worker.stop_requested = not turns.after_step(done - seen[0])
        seen[0] = done

    worker.progress = progress
    with contextlib.suppress(Stopped):
        train(job, worker)
    return {}


def probed(job: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: what the program's own probe chooses for this training."""
    import torch

    from models.training import Trainer

    torch.set_num_threads(worker.threads)
    return {"numerics": Trainer(job, worker).numerics}


def bare_steps(job: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: the same steps on tensors that lie ready."""
    import torch

    from models import probe
    from models.configs import TrainConfig
    from models.step import TrainStep
    from models.zoo import build

    torch.set_num_threads(worker.threads)
    if job.get("keep_memory", True):
        keep_freed_memory()
    config, turns, number = TrainConfig.model_validate(job["config"]), turns_of(job), 0
    step = TrainStep(config, build(config.model, NUM_CLASSES), job["numerics"], 3000, job["device"])
    batch = probe.made_up_batch(config, NUM_CLASSES, False, None, config.replicas)
    while True:
        step(batch, number)
        _wait(job["device"])
        number += 1
        if not turns.after_step(config.labeled_batch):
            return {}


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def bfloat16(job: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: whether the device computes in bfloat16; emulated, it is several times slower than float32."""
    from models.precision import computes_in_bfloat16

    return {"computes": computes_in_bfloat16(job["device"])}


def timm_steps(job: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: timm's loader and the loop of its train.py."""
    import timm
    import timm.optim
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config

    torch.set_num_threads(worker.threads)
    flags, device, turns = job["flags"], torch.device(job["device"]), turns_of(job)
    model = timm.create_model(job["model"], num_classes=NUM_CLASSES).to(device).train()
    config = resolve_data_config({"input_size": (3, job["size"], job["size"])}, model=model)
    cuda = job["device"] == "cuda"
    loader = create_loader(
        create_dataset("", job["folder"]), batch_size=job["batch"], is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.0,
        num_workers=8 if cuda else 2, persistent_workers=True, input_size=config["input_size"], mean=config["mean"], std=config["std"],
        interpolation=config["interpolation"], device=device, use_prefetcher=cuda,
    )  # fmt: skip
    optimizer = timm.optim.create_optimizer_v2(model, "rmsproptf", lr=1e-4, momentum=0.9)
    if "cl" in flags:
        model = model.to(memory_format=torch.channels_last)
    forward: Any = torch.compile(model) if "compile" in flags else model
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            if "cl" in flags:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled="bf16" in flags):
                loss = torch.nn.functional.cross_entropy(forward(images).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _wait(job["device"])
            if not turns.after_step(job["batch"]):
                return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=25, help="that each run is timed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--ranks", action="store_true", help="instead: two DDP processes against one with the same two replicas"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name:
        folder = Path(name)
        write_data(folder, options.photos)
        dataset = prepare(folder)
        numerics = run("benchmarks.training:probed", spec(options, folder, dataset, None, 1, 1))["numerics"]
        print(f"our numerics: {numerics}", flush=True)
        contenders = _contenders(options, folder, dataset, numerics)
        for number in range(options.pairs):
            found = {name: round(contender.turn(), 1) for name, contender in contenders.items()}
            print(f"pair {number + 1}:", found, flush=True)
        for contender in contenders.values():
            contender.end()
        _report(options, contenders)


def _contenders(
    options: argparse.Namespace, folder: Path, dataset: str, numerics: dict[str, Any]
) -> dict[str, Contender]:
    """All of them, set up and waiting; timm with those of its flags that were fastest in a turn of half the length."""
    timing = {"warm": WARM_STEPS, "seconds": options.seconds, "device": options.device}
    if options.ranks:
        return {
            name: Contender(
                folder, name, TRAINING, {**spec(options, folder, dataset, numerics, ranks, 2), **timing}, ranks
            )
            for name, ranks in zip(TWO, (1, 2), strict=True)
        }
    peer = {
        **timing,
        "model": options.model,
        "size": options.size,
        "batch": options.batch,
        "folder": str(folder / "timm"),
    }
    flags_here = FLAGS if run("benchmarks.training:bfloat16", {"device": options.device})["computes"] else FLAGS[:2]
    tried: dict[tuple[str, ...], float] = {}
    for count in range(len(flags_here) + 1):
        for flags in itertools.combinations(flags_here, count):
            job = {**peer, "flags": flags, "warm": 3, "seconds": options.seconds / 2}
            trial = Contender(folder, " ".join(("trial", *flags)), TIMM, job, huge_pages=False)
            tried[flags] = trial.turn()
            trial.end()
    best = max(tried, key=lambda flags: tried[flags])
    print("timm's flags:", {" ".join(f) or "defaults": round(r, 1) for f, r in tried.items()}, flush=True)
    job = {**spec(options, folder, dataset, numerics, 1, 1), **timing}
    jobs: dict[str, tuple[Any, ...]] = {
        "timm's defaults": (TIMM, {**peer, "flags": ()}),
        "timm's best flags": (TIMM, {**peer, "flags": best}),
        "the bare step": (BARE, job),
        OURS: (TRAINING, job),
    }
    # a user of timm has huge pages by chance only
    return {name: Contender(folder, name, *job, huge_pages=job[0] != TIMM) for name, job in jobs.items()}


def _report(options: argparse.Namespace, contenders: dict[str, Contender]) -> None:
    print(f"{options.model} at {options.size} px, batch {options.batch}, medians of {options.pairs}")
    for name, contender in contenders.items():
        rates = contender.rates
        spread = f"{min(rates):.1f}-{max(rates):.1f}"
        setup = f"first step after {contender.setup_s:.0f} s"
        print(f"{name}: {statistics.median(rates):.1f} images/s ({spread}); {setup}")
    aims = [(OURS, name, aim) for name, aim in AIMS.items()]
    if options.ranks:
        aims = [(TWO[1], TWO[0], RANKS_AIM)]
    missed = [other for ours, other, aim in aims if not _reached(contenders, ours, other, aim)]
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


def _reached(contenders: dict[str, Contender], ours: str, other: str, aim: float) -> bool:
    ratios = [a / b for a, b in zip(contenders[ours].rates, contenders[other].rates, strict=True)]
    median = statistics.median(ratios)
    print(f"{ours} against {other}: {median:.2f} ({min(ratios):.2f}-{max(ratios):.2f}), aim {aim}")
    return median >= aim


if __name__ == "__main__":
    main()
