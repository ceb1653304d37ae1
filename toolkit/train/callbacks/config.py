"""Configs of the callbacks, and `CallbacksConfig`, which names them.

A new callback is one file with its class and one name, a field of `CallbacksConfig`; the config
between them says where the class is (`implementation`). Fields stand in the order in which
callbacks are called: what measures, then what evaluates, then what saves and shows. Configs that
belong together may be a module of their own beside this one, over `config_base.py`.
"""

from typing import Any, Literal

import msgspec

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive
from toolkit.config.named import users_subclass
from toolkit.config.paths import PathOrURL
from toolkit.train.callbacks.config_base import CallbackConfig
from toolkit.train.callbacks.config_monitors import (
    GPUMemoryMonitorConfig,
    NotifierConfig,
    ProfilerConfig,
    RankMonitorConfig,
    StabilityMonitorConfig,
    StatisticsMonitorConfig,
)
from toolkit.train.trackers.config import (
    AimConfig,
    ClearMLConfig,
    CometConfig,
    MLflowConfig,
    SwanLabConfig,
    TensorBoardConfig,
    TrackioConfig,
    WandBConfig,
)


class ConsoleLoggerConfig(CallbackConfig, kw_only=True):
    """Progress bar on a terminal, plain lines elsewhere."""

    implementation = "toolkit.train.callbacks.console_logger:ConsoleLogger"

    interval: int = 10
    """Steps between plain lines."""


class SpeedMonitorConfig(CallbackConfig, kw_only=True):
    """Tokens per second, MFU, time spent waiting for data, peak memory."""

    implementation = "toolkit.train.callbacks.monitors:SpeedMonitor"

    peak_flops: float | None = None
    """Dense bf16 FLOP/s of one device, as torch counts them, for MFU. Null: by the device's name;
    where that is not known there is no MFU."""

    def __post_init__(self) -> None:
        check_positive(self, "peak_flops")


class GarbageCollectorConfig(CallbackConfig, kw_only=True):
    """Collect Python garbage at fixed steps, so that ranks do not pause at different times."""

    implementation = "toolkit.train.callbacks.monitors:GarbageCollector"

    interval: int = 1000
    """Steps between collections."""


class NetworkMonitorConfig(CallbackConfig, kw_only=True):
    """Global and per-layer gradient and weight norms into network.jsonl."""

    implementation = "toolkit.train.callbacks.monitors:NetworkMonitor"

    interval: int = 100
    """Steps between measurements."""


class SystemMonitorConfig(CallbackConfig, kw_only=True):
    """CPU, memory, disk, network interfaces and GPU into system.jsonl, from a background thread."""

    implementation = "toolkit.train.callbacks.monitors:SystemMonitor"

    interval_seconds: float = 10.0
    """Seconds between samples."""

    def __post_init__(self) -> None:
        check_positive(self, "interval_seconds")


class LMEvaluatorConfig(CallbackConfig, kw_only=True):
    """Loss, perplexity and bits per byte on the validation split."""

    implementation = "toolkit.train.callbacks.lm_evaluator:LMEvaluator"

    interval: int = 250
    """Steps between evaluations."""
    at_start: bool = False
    """Evaluate before the first step too."""
    at_end: bool = True
    """Evaluate after the last step."""


class CheckpointerConfig(CallbackConfig, kw_only=True):
    """When checkpoints are written and how many stay."""

    implementation = "toolkit.train.callbacks.checkpointer:Checkpointer"

    interval: int = 1000
    """Steps between checkpoints."""
    fixed_steps: tuple[int, ...] = ()
    """Further steps to save at; these checkpoints are never removed."""
    ephemeral_interval: int | None = None
    """Steps between checkpoints against crashes only, of which the newest stays until any newer one
    is committed."""
    keep_last: int | None = 3
    """Older ones are removed after a newer is committed; null: keep all."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this stay, however old."""
    keep_best: int | None = None
    """This many with the best `best_metric` stay. Only a checkpoint at the step of an evaluation
    has one."""
    best_metric: str = "val/loss"
    """What `keep_best` compares: name of the evaluation and of its result."""
    best_mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""
    asynchronous: bool = True
    """Training waits only while the state is copied to host memory (its size once more), which is
    then written in the background. Off: it waits until the checkpoint is committed."""
    on_error: Literal["continue", "stop"] = "continue"
    """What a checkpoint that cannot be written means during training: go on with the ones there are
    (an error is logged), or end the run. At the end of training it always fails the run."""
    upload_to: PathOrURL | None = None
    """URL of a folder of this run's own (`s3://`, `gs://`) to which each checkpoint is copied after
    it is committed, under the same rules of what stays. A run whose own checkpoints are gone
    resumes from there. The next save waits for the copy."""
    at_end: bool = True
    """Save after the last step."""
    export_hf: bool = True
    """Write safetensors weights (`hf/`) into the final checkpoint, where the architecture has a
    transformers class."""

    def __post_init__(self) -> None:
        check_positive(self, "keep_last", "keep_every", "keep_best", "ephemeral_interval")
        if any(step < 0 for step in self.fixed_steps):
            raise ValueError(f"fixed_steps must not be negative: {list(self.fixed_steps)}")


class SampleWriterConfig(CallbackConfig, kw_only=True):
    """Prints text generated by the final model."""

    implementation = "toolkit.evaluate.sample_writer:SampleWriter"

    enabled: bool = False
    """On: after the last step one sample is generated and printed."""
    prompt: str = ""
    """Text to continue; empty: start from the end-of-document token."""
    max_new_tokens: int = 120
    """Tokens to generate."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the most likely token."""
    top_k: int = 50
    """Sample among this many most likely tokens; 0: among all."""

    def __post_init__(self) -> None:
        check_not_negative(self, "max_new_tokens", "temperature", "top_k")


class CustomCallbackConfig(CallbackConfig, kw_only=True):
    """A callback written in Python."""

    target: str
    """Its class, `module:Class`, a `toolkit.Callback`; modules in the current folder are found
    too."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Arguments of the class."""

    def own_class(self, name: str) -> Any:
        """The class `target` of the callback `name`. Raises ConfigError where it is no callback, or
        does not take `options`."""
        base = "toolkit.train.callbacks.base:Callback"
        return users_subclass(self, base, key=f"trainer.callbacks.custom.{name}")


class CallbacksConfig(Config, kw_only=True):
    """The trainer's callbacks, called in this order."""

    speed_monitor: SpeedMonitorConfig = SpeedMonitorConfig()
    garbage_collector: GarbageCollectorConfig = GarbageCollectorConfig()
    network_monitor: NetworkMonitorConfig = NetworkMonitorConfig()
    system_monitor: SystemMonitorConfig = SystemMonitorConfig()
    gpu_memory_monitor: GPUMemoryMonitorConfig = GPUMemoryMonitorConfig()
    rank_monitor: RankMonitorConfig = RankMonitorConfig()
    statistics_monitor: StatisticsMonitorConfig = StatisticsMonitorConfig()
    stability_monitor: StabilityMonitorConfig = StabilityMonitorConfig()
    lm_evaluator: LMEvaluatorConfig = LMEvaluatorConfig()
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    wandb: WandBConfig = WandBConfig()
    trackio: TrackioConfig = TrackioConfig()
    mlflow: MLflowConfig = MLflowConfig()
    comet: CometConfig = CometConfig()
    clearml: ClearMLConfig = ClearMLConfig()
    swanlab: SwanLabConfig = SwanLabConfig()
    aim: AimConfig = AimConfig()
    checkpointer: CheckpointerConfig = CheckpointerConfig()
    sample_writer: SampleWriterConfig = SampleWriterConfig()
    console_logger: ConsoleLoggerConfig = ConsoleLoggerConfig()
    notifier: NotifierConfig = NotifierConfig()
    profiler: ProfilerConfig = ProfilerConfig()
    custom: dict[str, CustomCallbackConfig] = msgspec.field(default_factory=dict)
    """Callbacks of your own, by any name."""

    def __post_init__(self) -> None:
        if taken := sorted(set(self.custom) & set(self.__struct_fields__)):
            raise ValueError(f"custom: {taken[0]} is a callback already; choose another name")
        for name in self.__struct_fields__:
            interval = getattr(getattr(self, name), "interval", 1)
            if interval <= 0:
                raise ValueError(f"{name}.interval must be greater than 0, not {interval}")

    def build(self) -> dict[str, Any]:
        """The enabled callbacks by name, in the order of the fields; then the user's own."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__ if name != "custom"}
        callbacks = {name: config.build() for name, config in fields.items() if config.enabled}
        for name, own in self.custom.items():
            if own.enabled:
                callbacks[name] = own.own_class(name)(**own.options)
        return callbacks
