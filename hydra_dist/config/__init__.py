"""Every setting a user may write, strict and frozen; mistakes become messages that name the key and what works.

What follows from the settings (parameters, FLOPs, bytes) is in ``costs/``. No torch here: a laptop that only asks a
question loads none.
"""

from hydra_dist.config.context import ContextConfig
from hydra_dist.config.model import LayerSettings, ModelConfig
from hydra_dist.config.run import (
    UNSUPPORTED,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    OptimizerConfig,
    Refusal,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "UNSUPPORTED",
    "CheckpointConfig",
    "Config",
    "ContextConfig",
    "DataConfig",
    "EvaluateConfig",
    "LayerSettings",
    "ModelConfig",
    "OptimizerConfig",
    "Refusal",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "ZeroConfig",
]
