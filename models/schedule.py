"""Learning rate and weight-average decay as pure functions of the step."""

import math

from models.configs import TrainConfig


def total_steps(config: TrainConfig, num_labeled: int) -> int:
    """Optimizer steps of a training: labeled epochs x labeled images / labeled batch, at least one (0 epochs: none)."""
    return max(1 if config.epochs else 0, round(config.epochs * num_labeled / config.labeled_batch))


def learning_rate(config: TrainConfig, step: int, num_labeled: int) -> float:
    """The rate of step `step` (from 0), driven by labeled epochs only (facts: schedule).

    Peak: lr_per_256 x labeled_batch / 256. Linear warm-up; then x decay_factor every decay_epochs in steps, counted
    from the start of training, or a cosine to zero at the last step.
    """
    peak = config.optimizer.lr_per_256 * config.labeled_batch / 256
    schedule = config.schedule
    epoch = step * config.labeled_batch / num_labeled
    if epoch < schedule.warmup_epochs:
        return peak * min(1.0, (epoch + config.labeled_batch / num_labeled) / schedule.warmup_epochs)
    if schedule.kind == "exponential":
        return peak * schedule.decay_factor ** math.floor(epoch / schedule.decay_epochs)
    span = max(config.epochs - schedule.warmup_epochs, 1e-12)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - schedule.warmup_epochs) / span)))


def ema_decay(config: TrainConfig, step: int) -> float:
    """The share of the old average at step `step` (from 0): min(decay, (1 + step) / (10 + step)), TensorFlow's warm-up."""
    return min(config.ema_decay, (1 + step) / (10 + step))
