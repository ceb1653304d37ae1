"""All schedules, and the union that a config chooses from by `type`."""

from toolkit.optim.curves import (
    ClassScheduleConfig,
    ConstantConfig,
    CosineConfig,
    CosineLinearConfig,
    ExponentialConfig,
    HalfCosineConfig,
    InvSqrtConfig,
    LinearConfig,
    PowerConfig,
    WSDConfig,
)
from toolkit.optim.schedule import Schedule, Span
from toolkit.optim.stages import ComposableConfig, SequentialConfig
from toolkit.optim.wsds import WSDSConfig

__all__ = [
    "ClassScheduleConfig", "ComposableConfig", "ConstantConfig", "CosineConfig",
    "CosineLinearConfig", "ExponentialConfig", "HalfCosineConfig", "InvSqrtConfig", "LinearConfig",
    "PowerConfig", "Schedule", "SchedulerConfig", "SequentialConfig", "Span", "WSDConfig",
    "WSDSConfig",
]  # fmt: skip

SchedulerConfig = (
    ConstantConfig
    | LinearConfig
    | CosineConfig
    | HalfCosineConfig
    | CosineLinearConfig
    | InvSqrtConfig
    | WSDConfig
    | WSDSConfig
    | PowerConfig
    | ExponentialConfig
    | SequentialConfig
    | ComposableConfig
    | ClassScheduleConfig
)
