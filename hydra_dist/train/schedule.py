"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math

from hydra_dist.config import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at ``step`` (0-based) of ``total_steps``.

    Linear warm-up over ``warmup_steps``, so that the first step already learns; then

    - ``cosine``: half a cosine down to ``final_fraction`` at the last step (Loshchilov and Hutter 2017, eq. 5);
    - ``wsd``: the peak until the last ``decay_fraction`` of the steps, then linear down (Hu et al. 2024, section 4);
    - ``constant``: the peak.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    final = schedule.final_fraction
    match schedule.name:
        case "constant":
            return 1.0
        case "cosine":
            progress = (step - schedule.warmup_steps) / max(1, total_steps - 1 - schedule.warmup_steps)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case "wsd":
            decay_steps = max(1, round(total_steps * schedule.decay_fraction))
            remaining = (total_steps - 1 - step) / decay_steps
            return final + (1 - final) * min(1.0, max(0.0, remaining))
