"""Configs of the train module, the trainer and its callbacks."""

from typing import Any, Literal

import msgspec

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive, in_seconds
from toolkit.config.named import named, users_subclass
from toolkit.config.paths import LocalPath, PathOrURL
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    ContextParallelConfig,
    DataParallelConfig,
    ExpertParallelConfig,
    LogRanks,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.models.config import LoRAConfig
from toolkit.optim.config import AdamWConfig, OptimConfig
from toolkit.optim.schedules import CosineConfig, SchedulerConfig

Unit = Literal["steps", "tokens", "epochs"]

NO_BASE = (
    "train_module.lora trains an adapter on a model that exists: name its checkpoint with "
    "--trainer.load_path=... (and leave trainer.load_strategy as it is)"
)
"""What is wrong where `lora` is set and there is nothing to train it on."""


class Duration(Config, kw_only=True):
    """A length of training."""

    value: int
    """How many."""
    unit: Unit = "steps"
    """Of what."""

    def __post_init__(self) -> None:
        check_positive(self, "value")


class TransformerTrainModuleConfig(Config, kw_only=True):
    """How a language model is trained: loss, optimizer, schedule, precision, parallelism."""

    rank_microbatch_size: int | None = 16_384
    """Tokens per forward on one rank; gradient accumulation follows from
    `data_loader.global_batch_size`. Null: the rank's whole share of it, no accumulation."""
    optim: OptimConfig = AdamWConfig()
    """The optimizer."""
    scheduler: SchedulerConfig = CosineConfig()
    """Learning-rate schedule: a pure function of step or tokens."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; null: never clip."""
    z_loss_multiplier: float | None = None
    """Adds this times mean(logsumexp(logits)^2) to the loss (PaLM, Chowdhery et al. 2022)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type. Master weights and optimizer state are fp32 always. `auto`: the launcher's
    mixed_precision, else bf16 where the hardware is fast at it."""
    dp_config: DataParallelConfig | None = None
    """Engine for launchers that do not name one (`torchrun`)."""
    tp_config: TensorParallelConfig | None = None
    """Tensor parallelism; needs `fsdp` or `hsdp`. Null: off, or as the launcher says."""
    cp_config: ContextParallelConfig | None = None
    """Context parallelism. Null: off, or as the launcher says."""
    pp_config: PipelineParallelConfig | None = None
    """Pipeline parallelism; needs `fsdp` or `hsdp`. Null: off."""
    ep_config: ExpertParallelConfig | None = None
    """Expert parallelism of a mixture of experts; needs `fsdp` or `hsdp`. Null: off."""
    ac_config: ActivationCheckpointingConfig | None = None
    """Activation checkpointing; null: off."""
    compile_model: bool = False
    """torch.compile each transformer block and the loss."""
    freeze: tuple[str, ...] = ()
    """Shell-style patterns over parameter names: these keep their values. A pattern that matches
    nothing is an error, and so is nothing left to train."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters on the model in `trainer.load_path`, of which the weights alone are
    taken, and keep their values; null: train the weights."""
    max_consecutive_skipped_steps: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient."""
    target: str | None = None
    """`module:Class` of a `TransformerTrainModule` of your own, to train in the place of it;
    modules in the current folder are found too."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Further arguments of that class."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            "rank_microbatch_size",
            "max_grad_norm",
            "z_loss_multiplier",
            "max_consecutive_skipped_steps",
        )
        pipeline = self.pp_config
        if self.compile_model and pipeline and pipeline.schedule == "ZBVZeroBubble":
            raise ValueError(
                "compile_model does not go with pp_config.schedule ZBVZeroBubble, which needs the "
                "backward of a block in two halves; use 1F1B or Interleaved1F1B"
            )
        if self.ac_config and self.ac_config.mode == "budget" and not self.compile_model:
            raise ValueError("ac_config.mode: budget needs compile_model: true")

    def build(self, model: Any, **context: Any) -> Any:
        """The `TransformerTrainModule` of `model`, which is usually on the meta device."""
        if self.target is None:
            return named("toolkit.train.transformer:TransformerTrainModule")(self, model, **context)
        return self.own_class()(self, model, **context, **self.options)

    def own_class(self) -> Any:
        """The class `target`. Raises ConfigError where it is no train module, or does not take
        `options`."""
        base = "toolkit.train.transformer:TransformerTrainModule"
        return users_subclass(self, base, self, None, key="train_module")


class CallbackConfig(Config, kw_only=True):
    """Base of the callbacks' configs."""

    enabled: bool = True
    """Off: it is not called."""


class ConsoleLoggerConfig(CallbackConfig, kw_only=True):
    """Progress bar on a terminal, plain lines elsewhere."""

    interval: int = 10
    """Steps between plain lines."""


class SpeedMonitorConfig(CallbackConfig, kw_only=True):
    """Tokens per second, MFU, time spent waiting for data, peak memory."""

    peak_flops: float | None = None
    """Dense bf16 FLOP/s of one device, as torch counts them, for MFU. Null: by the device's name;
    where that is not known there is no MFU."""

    def __post_init__(self) -> None:
        check_positive(self, "peak_flops")


class GarbageCollectorConfig(CallbackConfig, kw_only=True):
    """Collect Python garbage at fixed steps, so that ranks do not pause at different times."""

    interval: int = 1000
    """Steps between collections."""


class NetworkMonitorConfig(CallbackConfig, kw_only=True):
    """Global and per-layer gradient and weight norms into network.jsonl."""

    interval: int = 100
    """Steps between measurements."""


class SystemMonitorConfig(CallbackConfig, kw_only=True):
    """CPU, memory, disk, network interfaces and GPU into system.jsonl, from a background thread."""

    interval_seconds: float = 10.0
    """Seconds between samples."""

    def __post_init__(self) -> None:
        check_positive(self, "interval_seconds")


class LMEvaluatorConfig(CallbackConfig, kw_only=True):
    """Loss, perplexity and bits per byte on the validation split."""

    interval: int = 250
    """Steps between evaluations."""
    at_start: bool = False
    """Evaluate before the first step too."""
    at_end: bool = True
    """Evaluate after the last step."""


class CheckpointerConfig(CallbackConfig, kw_only=True):
    """When checkpoints are written and how many stay."""

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
    lm_evaluator: LMEvaluatorConfig = LMEvaluatorConfig()
    checkpointer: CheckpointerConfig = CheckpointerConfig()
    sample_writer: SampleWriterConfig = SampleWriterConfig()
    console_logger: ConsoleLoggerConfig = ConsoleLoggerConfig()
    custom: dict[str, CustomCallbackConfig] = msgspec.field(default_factory=dict)
    """Callbacks of your own, by any name."""

    def __post_init__(self) -> None:
        if taken := sorted(set(self.custom) & set(self.__struct_fields__)):
            raise ValueError(f"custom: {taken[0]} is a callback already; choose another name")
        for name in self.__struct_fields__:
            interval = getattr(getattr(self, name), "interval", 1)
            if interval <= 0:
                raise ValueError(f"{name}.interval must be greater than 0, not {interval}")


class TrainerConfig(Config, kw_only=True):
    """The loop: how long, what is recorded, what is called."""

    max_duration: Duration = Duration(value=1, unit="epochs")
    """Length of the whole run; schedules end here."""
    hard_stop: Duration | None = None
    """Stop here without changing the schedule (for trying things out)."""
    no_checkpoints: bool = False
    """Write no checkpoints at all."""
    no_evals: bool = False
    """Run no evaluations at all."""
    load_path: PathOrURL | None = None
    """Checkpoint (`step{N}` folder) or run folder to start from, local or a URL (`s3://`,
    `gs://`)."""
    load_in_place: bool = False
    """A `load_path` that is a URL is not downloaded: each rank reads what it holds."""
    load_strategy: Literal["if_available", "always", "never"] | None = None
    """Whether `load_path` must hold a checkpoint. Null: it must, where one is given;
    `if_available`: train from fresh weights where there is none."""
    load_weights_only: bool = False
    """From `load_path` take the weights, with a fresh optimizer, schedule and data order."""
    load_key_mapping: dict[str, str] = msgspec.field(default_factory=dict)
    """Parameters that `load_path` has under other names: regular expression over this model's names
    -> replacement that gives the checkpoint's, applied in order."""
    start_anew: bool = False
    """Start again from step 0 where a run has trained and has no whole checkpoint to go on from;
    what it recorded and saved stays under other names. For one start: it is not stored."""
    metrics_collect_interval: int = 5
    """Steps between transfers of metrics from the device."""
    cancel_check_interval: int = 1
    """Steps between agreements of all ranks on a requested stop; they stop one agreement later."""
    max_wall_time: float | str | None = None
    """Stop with a checkpoint before this much time has passed since the start of the process, or of
    its launcher: seconds, or text such as `11h30m`. Null: no limit."""
    wall_time_margin: float | str | None = None
    """How long before `max_wall_time` to stop; null: twice the longest time so far between two
    steps or for a save, at least 60 s."""
    stop_file: LocalPath | None = "stop"
    """Stop with a checkpoint when this file appears (looked for once a second, removed then); a
    relative path is inside the run folder. Null: never look."""
    watchdog_timeout: float | None = 1200.0
    """End the job, naming the slow rank, after this many seconds without progress (three times as
    many for the first step, evaluation, saving and other callbacks). Null: wait for ever."""
    collective_timeout: float = 1800.0
    """Seconds after which an exchange between ranks, for which one of them does not come, fails."""
    log_ranks: LogRanks = "rank0"
    """Which ranks write to the console: `rank0`; `local_rank0`, one of each machine; `all`. Every
    rank writes its log file."""
    deterministic: bool = False
    """Bit-equal runs on the same machine: torch's deterministic algorithms (CPU runs are so
    without it)."""
    callbacks: CallbacksConfig = CallbacksConfig()
    """What is called at each event of the loop."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            "metrics_collect_interval",
            "cancel_check_interval",
            "watchdog_timeout",
            "collective_timeout",
        )
        if self.load_path is not None and self.load_path.startswith("file:"):
            path = f"/{self.load_path.removeprefix('file:').lstrip('/')}"
            raise ValueError(f"load_path: a URL; write the path itself: {path}")
        for name in ("max_wall_time", "wall_time_margin"):
            value = getattr(self, name)
            if value is not None:
                try:
                    in_seconds(value)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
