"""Which dtype, layout and compilation a training computes in: measured once, before the first step, on this machine.

What is fastest depends on the network and the processor (EfficientNet-B0 at 128 px on a CPU with avx512_bf16: compiled
float32 beats compiled bfloat16; ResNet-18: the other way round), so candidates do real steps on made-up images. A short
training takes the default without ado.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from models.configs import TrainConfig
from models.loader import CleanView, ReplicaBatch
from models.step import TrainStep

Numerics = dict[str, Any]
MakeStep = Callable[[Numerics], TrainStep]
WORTH_PROBING_S = 600.0  # of a whole training: below that, a few seconds saved are not worth the asking
WORTH_COMPILING_S = 1200.0  # compiling forward and backward of a network takes minutes on a CPU
MOST_SHARE = 0.02  # of the training's time that the timed steps of one candidate may take
TIMED_STEPS = 12  # the least counts: a shared machine is slower for seconds on end


def choose(
    choices: Sequence[Numerics],
    make_step: MakeStep,
    batch: list[ReplicaBatch],
    num_steps: int,
    log: Callable[[str], None] = print,
) -> Numerics:
    """The numerics with which `num_steps` steps like `batch` take least time, compiling included.

    `choices` are candidates, the default first, those that compile last. One that fails is left out with a line in the
    log. Where the whole training takes under ten minutes the default is taken, after one step.
    """
    default, *others = choices
    if not others:
        return default
    setup, seconds = _measure(make_step, default, batch, 0.0)
    best, least = default, setup + seconds * num_steps
    found = [(default, least)]
    if seconds * num_steps < WORTH_PROBING_S:
        return default
    for choice in others:
        if choice["compile"] and least < WORTH_COMPILING_S:
            continue
        try:
            setup, seconds = _measure(make_step, choice, batch, MOST_SHARE * least)
        except Exception as error:  # an operation without a kernel for this dtype, a compiler that is not there, memory
            log(f"probe: {describe(choice)} does not run ({str(error).strip().splitlines()[:1]})")
            continue
        found.append((choice, setup + seconds * num_steps))
        if found[-1][1] < least:
            best, least = found[-1]
    log("probe: " + "; ".join(f"{describe(choice)} {total / 3600:.2f} h" for choice, total in found))
    return best


def describe(numerics: Numerics) -> str:
    """In a few words."""
    return f"{numerics['dtype']} {numerics['layout']}{' compiled' if numerics['compile'] else ''}"


def made_up_batch(
    config: TrainConfig, num_classes: int, student: bool, online: CleanView | None, replicas: int
) -> list[ReplicaBatch]:
    """The batch of one rank with the shapes of a real one and made-up pixels."""
    n = config.replica_labeled if config.train_on == "both" or not student else 0
    m = config.replica_unlabeled if student else 0
    size, generator = config.model.image_size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n + m, size, size, 3), dtype=torch.uint8, generator=generator)
    side = online.image_size if online else 0
    clean = (
        torch.randint(0, 256, (m, side, side, 3), dtype=torch.uint8, generator=generator) if online else torch.zeros(0)
    )
    pseudo = torch.full((m, num_classes), 1.0 / num_classes) if m and not online else torch.zeros(0)
    return [ReplicaBatch(images, torch.zeros(n, dtype=torch.int64), pseudo, clean)] * replicas


def _measure(make_step: MakeStep, numerics: Numerics, batch: list[ReplicaBatch], most_s: float) -> tuple[float, float]:
    """Seconds until the first step was done, less a step; and the least seconds of a step, of up to twelve."""
    started = time.perf_counter()
    step = make_step(numerics)
    _timed(step, batch, 0)
    first = time.perf_counter() - started
    began, least = time.perf_counter(), _timed(step, batch, 1)
    for number in range(2, TIMED_STEPS + 1):
        if time.perf_counter() - began > most_s:
            break
        least = min(least, _timed(step, batch, number))
    return max(0.0, first - least), least


def _timed(step: TrainStep, batch: list[ReplicaBatch], number: int) -> float:
    started = time.perf_counter()
    step(batch, number)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
