"""Training on photographs on this machine, tars to optimizer steps, against timm's train.py loop and the bare step.

python -m benchmarks.training [--model efficientnet_b0] [--size 224] [--batch 50] [--pairs 7] [--seconds 25] [--device cpu]

Before the pairs the program's own probe chooses dtype, layout and compilation once, as it does for a long training, and
all combinations of timm's flags are tried (bfloat16 where the hardware computes in it). Each pair then runs, one after
the other, each in a process of its own: timm with its defaults (eager, float32), timm with its best flags, our training
(loader, noise, steps, weight average), and our step fed with tensors that lie ready. Same network, photographs, batch,
RMSProp; timm's RandAugment is rand-m9-mstd0.5, which runs each of two operations with probability 0.5, ours always runs
both. What a process needs to start and to compile is left out and printed. Prints medians, spread and ratios pair by pair. Exits with an error where an aim is missed.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos.parquet"
FLAGS = ("cl", "compile", "bf16")  # of timm: --channels-last, --torchcompile, --amp --amp-dtype bfloat16
AIMS = {"timm's defaults": 1.8, "timm's best flags": 1.0, "the bare step": 0.9}
WARM_STEPS = 3
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
    import uuid

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
        "compute": ComputeConfig(ranks=ranks, checkpoint_steps=10**9, trackers=()).model_dump(mode="json"),
        "seconds": options.seconds,
    }


def timed_training(job: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: train for so many seconds past the first steps. Images a second, and the seconds before."""
    from models.training import train
    from models.worker import Stopped

    started = time.perf_counter()
    times: list[tuple[float, int]] = []

    def progress(done: int, total: int, unit: str = "images", last: bool = False, **facts: Any) -> None:
        times.append((time.perf_counter(), done))
        worker.stop_requested = len(times) > WARM_STEPS + 1 and times[-1][0] - times[WARM_STEPS][0] > job["seconds"]

    worker.progress = progress
    with contextlib.suppress(Stopped):
        train(job, worker)
    (begin, first), (end, last) = times[WARM_STEPS], times[-1]
    return {"rate": (last - first) / (end - begin), "setup_s": times[0][0] - started}


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
    config, started = TrainConfig.model_validate(job["config"]), time.perf_counter()
    step = TrainStep(config, build(config.model, NUM_CLASSES), job["numerics"], 3000, job["device"])
    batch = probe.made_up_batch(config, NUM_CLASSES, False, None, config.replicas)
    step(batch, 0)
    setup = time.perf_counter() - started
    for number in range(1, WARM_STEPS):
        step(batch, number)
    _wait(job["device"])
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < job["seconds"]:
        step(batch, WARM_STEPS + count)
        count += 1
    _wait(job["device"])
    return {"rate": count * config.labeled_batch / (time.perf_counter() - begin), "setup_s": setup}


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
    flags, device = job["flags"], torch.device(job["device"])
    started = time.perf_counter()
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
    times: list[float] = []
    while not times or len(times) <= WARM_STEPS or times[-1] - times[WARM_STEPS] < job["seconds"]:
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
            times.append(time.perf_counter())
            if len(times) > WARM_STEPS + 1 and times[-1] - times[WARM_STEPS] > job["seconds"]:
                break
    steps = len(times) - 1 - WARM_STEPS
    return {"rate": steps * job["batch"] / (times[-1] - times[WARM_STEPS]), "setup_s": times[0] - started}


def run(function: str, job: dict[str, Any], world: int = 1, threads: int = 0) -> dict[str, Any]:
    """A worker function of this file in processes of its own."""
    from models.compute import num_cores
    from models.launch import run_worker

    said: list[str] = []
    name = f"benchmarks.training:{function}"
    found = run_worker(name, job, world=world, threads=threads or num_cores() // world, on_log=said.append)
    for line in said:
        if line.startswith("probe:"):
            print(line, flush=True)
    return found


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
        "--ranks", action="store_true", help="two DDP processes of one thread against one of two threads, too"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name:
        folder = Path(name)
        write_data(folder, options.photos)
        dataset = prepare(folder)
        numerics = run("probed", spec(options, folder, dataset, None, 1, 1))["numerics"]
        print(f"our numerics: {numerics}", flush=True)
        peer = {
            "model": options.model,
            "size": options.size,
            "batch": options.batch,
            "folder": str(folder / "timm"),
            "device": options.device,
        }
        flags_here = FLAGS if run("bfloat16", {"device": options.device})["computes"] else FLAGS[:2]
        tried = {
            flags: run("timm_steps", {**peer, "flags": flags, "seconds": options.seconds / 2})["rate"]
            for count in range(len(flags_here) + 1)
            for flags in itertools.combinations(flags_here, count)
        }
        best = max(tried, key=lambda flags: tried[flags])
        print("timm's flags:", {" ".join(f) or "defaults": round(r, 1) for f, r in tried.items()}, flush=True)
        job = spec(options, folder, dataset, numerics, 1, 1)
        contenders: dict[str, Any] = {
            "timm's defaults": lambda: run("timm_steps", {**peer, "flags": (), "seconds": options.seconds}),
            "timm's best flags": lambda: run("timm_steps", {**peer, "flags": best, "seconds": options.seconds}),
            "the bare step": lambda: run("bare_steps", job),
            "ours": lambda: run("timed_training", {**job, "key": f"{time.time_ns():032x}"}),
        }
        if options.ranks:
            two = spec(options, folder, dataset, numerics, 1, 2)
            contenders["two replicas, one process"] = lambda: run(
                "timed_training", {**two, "key": f"{time.time_ns():032x}"}
            )
            ranks = spec(options, folder, dataset, numerics, 2, 2)
            contenders["two replicas, two processes"] = lambda: run(
                "timed_training", {**ranks, "key": f"{time.time_ns():032x}"}, world=2
            )
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        setups: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(options.pairs):
            for name, contender in contenders.items():
                found = contender()
                rates[name].append(found["rate"])
                setups[name].append(found["setup_s"])
            print(f"pair {number + 1}:", {name: round(values[-1], 1) for name, values in rates.items()}, flush=True)
        _report(options, best, rates, setups)


def _report(
    options: argparse.Namespace, best: tuple[str, ...], rates: dict[str, list[float]], setups: dict[str, list[float]]
) -> None:
    print(
        f"{options.model} at {options.size} px, batch {options.batch}, medians of {options.pairs}; timm's best flags: {best}"
    )
    for name, values in rates.items():
        spread = f"{min(values):.1f}-{max(values):.1f}"
        print(
            f"{name}: {statistics.median(values):.1f} images/s ({spread}); first step after {statistics.median(setups[name]):.0f} s"
        )
    missed = []
    aims = {**AIMS}
    for name, aim in aims.items():
        missed += _against("ours", name, aim, rates)
    if options.ranks:
        missed += _against("two replicas, two processes", "two replicas, one process", 0.9, rates)
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


def _against(ours: str, other: str, aim: float, rates: dict[str, list[float]]) -> list[str]:
    ratios = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
    median = statistics.median(ratios)
    print(f"{ours} against {other}: {median:.2f} ({min(ratios):.2f}-{max(ratios):.2f}), aim {aim}")
    return [other] if median < aim else []


if __name__ == "__main__":
    main()
