"""All schedules: the union that a config chooses from by `type`."""

from toolkit.optim.curves import ClassScheduleConfig, ConstantConfig, CosineConfig, CurveConfig
from toolkit.optim.schedule import Schedule, Span
from toolkit.optim.stages import ComposableConfig, SequentialConfig
from toolkit.optim.wsds import WSDSConfig

__all__ = [
    "ClassScheduleConfig", "ConstantConfig", "CosineConfig", "Schedule", "SchedulerConfig", "Span",
]  # fmt: skip

SchedulerConfig = (
    CurveConfig | WSDSConfig | SequentialConfig | ComposableConfig | ClassScheduleConfig
)
