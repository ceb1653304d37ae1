"""Configs of the train module and the trainer."""

from typing import Any, Literal

import msgspec

from toolkit.config import Config
from toolkit.config.base import check_positive, in_seconds
from toolkit.config.named import named, users_subclass
from toolkit.config.paths import LocalPath, PathOrURL
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    ContextParallelConfig,
    DataParallelConfig,
    ExpertParallelConfig,
    Float8Config,
    LogRanks,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.errors import ConfigError
from toolkit.models.architecture import GRAPH_MODES, AttentionBackend, CompileMode
from toolkit.models.lora_config import LoRAConfig
from toolkit.optim.config import AdamWConfig, OptimConfig
from toolkit.optim.schedules import CosineConfig, SchedulerConfig
from toolkit.train.callbacks.config import CallbacksConfig
from toolkit.train.preference.config import Objective

Unit = Literal["steps", "tokens", "epochs"]

NO_BASE = (
    "train_module.lora trains an adapter on a model that exists: name its checkpoint with "
    "--trainer.load_path=... (and leave trainer.load_strategy as it is)"
)
"""What is wrong where `lora` is set and there is nothing to train it on."""
ENGINES = ("single", "ddp")
"""Of models that are no Transformers of ours."""


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
    """Learning-rate schedule: a pure function of step, tokens or epochs."""
    schedules: dict[str, SchedulerConfig] = msgspec.field(default_factory=dict)
    """Other settings that follow a schedule, by name: those of `optim` (`weight_decay`, `betas.0`)
    and `z_loss_multiplier`. A schedule multiplies the setting's own value; what schedules call a
    rate is then this setting."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; null: never clip."""
    z_loss_multiplier: float | None = None
    """Adds this times mean(logsumexp(logits)^2) to the loss (PaLM, Chowdhery et al. 2022)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute type. Master weights and optimizer state are fp32 always. `auto`: the launcher's
    mixed_precision, else bf16 on GPUs that have it, and on CPUs what is faster, measured.
    `fp16` scales the loss, as much as gradients allow (dynamic loss scaling); not under ZeRO."""
    float8_config: Float8Config | None = None
    """Matrix products of linear layers in 8 bits, over `precision: bf16`; null: off."""
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
    activation_offload: bool = False
    """What blocks keep for backward waits in host memory; not for pipelines."""
    compile_model: bool | Literal["auto"] = "auto"
    """torch.compile each transformer block and the loss. `auto`: where the run is long enough to
    win back the time of compiling."""
    compile_mode: CompileMode = "default"
    """How, over `compile_model`. `max-autotune-no-cudagraphs`: kernels of matrix products are tried
    out, which takes minutes at the start; `reduce-overhead`: blocks are recorded as CUDA graphs,
    which start without the host (`single` and `ddp`, one microbatch a step; for small models);
    `max-autotune`: both."""
    attention_backend: AttentionBackend = "auto"
    """What computes attention. `auto`: SDPA without masks; with masks (documents, windows), soft
    caps or sinks flex attention on CUDA, else SDPA or plain operations. `sdpa` and `flex`: that one
    for all attention. The others name SDPA's kernel for attention without masks on CUDA, where
    `auto` takes what is measured on H100, H200 and B200, else torch's flash attention; `flash3`:
    FlashAttention 3, which must be installed. `engine.json` of the run says which."""
    freeze: tuple[str, ...] = ()
    """Shell-style patterns over parameter names: these keep their values. A pattern that matches
    nothing is an error, and so is nothing left to train."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters on the model in `trainer.load_path`, of which the weights alone are
    taken, and keep their values; null: train the weights."""
    objective: Objective | None = None
    """What is trained for, other than the next token: `dpo`, `kto`, `orpo`, `simpo`, `reward` or
    `distill`; null: the next token."""
    max_consecutive_skipped_steps: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient."""
    target: str | None = None
    """`module:Class` of a `TransformerTrainModule` of your own, to train in the place of it, also
    written `type`; modules in the current folder are found too."""
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
        if self.compile_model is True and pipeline and pipeline.schedule == "ZBVZeroBubble":
            raise ValueError(
                "compile_model does not go with pp_config.schedule ZBVZeroBubble, which needs the "
                "backward of a block in two halves; use 1F1B or Interleaved1F1B"
            )
        if self.ac_config and self.ac_config.mode == "budget" and self.compile_model is not True:
            raise ValueError("ac_config.mode: budget needs compile_model: true")
        if self.compile_mode != "default" and self.compile_model is not True:
            raise ValueError(f"compile_mode: {self.compile_mode} needs compile_model: true")
        if self.compile_mode in GRAPH_MODES and self.activation_offload:
            raise ValueError(
                f"compile_mode: {self.compile_mode} records CUDA graphs, which do not go with "
                "activation_offload; use max-autotune-no-cudagraphs"
            )
        if self.objective is not None and self.target is not None:
            raise ValueError("objective does not go with a train module of your own (type)")
        if self.objective is not None and self.z_loss_multiplier is not None:
            problem = "z_loss_multiplier belongs to the cross entropy of language models"
            raise ValueError(f"{problem}, not to objective; leave one of them out")
        selects = self.ac_config is not None and self.ac_config.mode == "selected_ops"
        if pipeline and self.activation_offload:
            problem = "activation_offload does not go with pp_config"
            raise ValueError(f"{problem}; use ac_config.mode: full")
        if selects and (pipeline or self.ep_config):
            # Experts that FSDP2 gathers inside of a block are gathered by other operators again.
            other = "pp_config" if pipeline else "ep_config"
            problem = f"ac_config.mode: selected_ops does not go with {other}"
            raise ValueError(f"{problem}; use mode: full or selected_blocks")
        if selects and self.activation_offload:
            raise ValueError(
                "activation_offload does not go with ac_config.mode: selected_ops, whose results "
                "stay on the device; use mode: full, or leave ac_config out"
            )

    def check_graphs(self, tokens: int) -> None:
        """Raises ConfigError where a step of `tokens` on each rank has several microbatches and
        `compile_mode` records CUDA graphs: the gradients of one lie where the next computes."""
        size = self.rank_microbatch_size
        if self.compile_mode in GRAPH_MODES and size is not None and tokens > size:
            raise ConfigError(
                f"{self.compile_mode} records CUDA graphs, for one microbatch a step; set "
                "train_module.rank_microbatch_size to null, or use max-autotune-no-cudagraphs",
                key="train_module.compile_mode",
            )

    def build(self, model: Any, **context: Any) -> Any:
        """The `TransformerTrainModule` of `model`, which is usually on the meta device."""
        if self.target is None:
            ours = "toolkit.train.transformer:TransformerTrainModule"
            name = ours if self.objective is None else self.objective.module
            return named(name)(self, model, **context)
        return self.own_class(any_model=True)(self, model, **context, **self.options)

    def own_class(self, *, any_model: bool = False) -> Any:
        """The class `target`. Raises ConfigError where it is no train module (of language models,
        but for `any_model`), or does not take `options`."""
        base = "toolkit.train.transformer:TransformerTrainModule"
        if any_model:
            base = "toolkit.train.module:TrainModule"
        return users_subclass(self, base, self, None, key="train_module")


def check_basic(config: TransformerTrainModuleConfig, engine: str) -> None:
    """Raise ConfigError for an engine, or an option, that only language models have."""
    if engine not in ENGINES:
        raise ConfigError(
            f"a model of your own trains with {' or '.join(ENGINES)}, not {engine}",
            key="train_module.dp_config",
        )
    of_language_models = ("lora", "objective", "z_loss_multiplier", "ac_config", "float8_config")
    given = [name for name in of_language_models if getattr(config, name) is not None]
    switches = ("compile_model", "activation_offload")
    given += [name for name in switches if getattr(config, name) is True]
    given += ["optim.mup"] if config.optim.mup is not None else []
    if given:
        raise ConfigError("is for language models; leave it out", key=f"train_module.{given[0]}")


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
    num_threads: int | None = None
    """CPU threads of each process. Null: its share of the machine's cores, or fewer where that is
    faster, measured. At most 4 for each core of the machine. The environment variable
    TOOLKIT_NUM_THREADS wins."""
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
            "num_threads",
        )
        if self.load_path is not None and self.load_path.startswith("file:"):
            path = f"/{self.load_path.removeprefix('file:').lstrip('/')}"
            raise ValueError(f"load_path: a URL; write the path itself: {path}")
        merger, saver = self.callbacks.model_merger, self.callbacks.checkpointer
        few = None if saver.keep_every or saver.fixed_steps else saver.keep_last
        if merger.enabled and few is not None and (merger.num_checkpoints or 0) > few:
            raise ValueError(
                f"callbacks.model_merger.last_checkpoints {merger.num_checkpoints} is more than "
                f"callbacks.checkpointer.keep_last {saver.keep_last} keeps; raise the latter"
            )
        for name in ("max_wall_time", "wall_time_margin"):
            value = getattr(self, name)
            if value is not None:
                try:
                    in_seconds(value)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
