"""Configs of callbacks that watch a run, and tell of it. All are off unless asked for."""

from typing import Literal

from toolkit.config.base import check_not_negative, check_positive
from toolkit.errors import ConfigError
from toolkit.train.callbacks.config_base import CallbackConfig

NotifierEvent = Literal["start", "end", "stop", "failure", "stall"]


class ProfilerConfig(CallbackConfig, kw_only=True):
    """torch.profiler over some steps: a trace for https://ui.perfetto.dev and a table of operators,
    in profiles/ of the run folder. Steps are counted from the start of the process."""

    implementation = "toolkit.train.callbacks.profiler:Profiler"

    enabled: bool = False
    """On: as the settings below say."""
    skip_first: int = 10
    """Steps before the first cycle: compiling and warming up are not what is asked for."""
    wait: int = 1
    """Steps of each cycle that are not traced."""
    warmup: int = 2
    """Steps of each cycle that are traced and thrown away."""
    active: int = 3
    """Steps of each cycle that are kept."""
    repeat: int = 1
    """Cycles; 0: to the end of training."""
    ranks: tuple[int, ...] | None = (0,)
    """Which ranks trace; null: all."""
    record_shapes: bool = False
    """Keep the shapes of operators' inputs."""
    profile_memory: bool = False
    """Keep allocations beside operators."""
    with_stack: bool = False
    """Keep the lines of Python (slow)."""
    memory_snapshot: bool = False
    """Keep what the CUDA allocator did in the traced steps, for https://pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        check_positive(self, "active")
        check_not_negative(self, "skip_first", "wait", "warmup", "repeat")


def check_profiler_device(config: ProfilerConfig, device: str) -> None:
    """Raises ConfigError where a `device` (as in `torch.device.type`) has no snapshots."""
    if config.enabled and config.memory_snapshot and device != "cuda":
        problem = f"needs a CUDA device; this run is on {device}"
        raise ConfigError(problem, key="trainer.callbacks.profiler.memory_snapshot")


class StatisticsMonitorConfig(CallbackConfig, kw_only=True):
    """Largest gradients and weights of each layer, and root mean square and largest value of what
    each block puts out, into network.jsonl."""

    implementation = "toolkit.train.callbacks.statistics_monitor:StatisticsMonitor"

    enabled: bool = False
    """On: measured every `interval` steps."""
    interval: int = 100
    """Steps between measurements."""
    activations: bool = True
    """Look at the outputs of blocks too."""


class StabilityMonitorConfig(CallbackConfig, kw_only=True):
    """Finds spikes of loss and gradient norm, says where each was, and keeps it with the instances
    of its batch in metrics/spikes.jsonl."""

    implementation = "toolkit.train.callbacks.stability_monitor:StabilityMonitor"

    enabled: bool = False
    """On: every step is compared with those before it."""
    window: int = 128
    """Steps that a step is compared with; half as many must have been."""
    sigma_factor: float = 6.0
    """So many standard deviations above their mean is a spike."""

    def __post_init__(self) -> None:
        check_positive(self, "sigma_factor")
        if self.window < 2:
            raise ValueError(f"window must be at least 2, not {self.window}")


class GPUMemoryMonitorConfig(CallbackConfig, kw_only=True):
    """Memory of the CUDA allocator into train.jsonl: the largest of any rank. Nothing on CPUs."""

    implementation = "toolkit.train.callbacks.gpu_memory_monitor:GPUMemoryMonitor"

    enabled: bool = False
    """On: measured every `interval` steps."""
    interval: int = 10
    """Steps between measurements."""


class RankMonitorConfig(CallbackConfig, kw_only=True):
    """Which rank the others wait for: time spent waiting for data, and for a small fixed
    computation, of every rank, into train.jsonl."""

    implementation = "toolkit.train.callbacks.rank_monitor:RankMonitor"

    enabled: bool = False
    """On: measured every `interval` steps."""
    interval: int = 100
    """Steps between measurements."""
    warn_ratio: float = 1.5
    """Warn where the slowest rank takes so many times the median."""

    def __post_init__(self) -> None:
        check_positive(self, "warn_ratio")


class NotifierConfig(CallbackConfig, kw_only=True):
    """Tells of a run's start and end, of a failure, and of a stall. A message that cannot be sent
    is logged, and never harms the run."""

    implementation = "toolkit.train.callbacks.notifier:Notifier"

    enabled: bool = False
    """On: give one or more of `webhook`, `slack` and `command`."""
    webhook: str | None = None
    """URL to which a JSON object is posted; `${VARIABLE}` keeps it out of files."""
    slack: str | None = None
    """URL of a Slack incoming webhook; `${VARIABLE}` keeps it out of files."""
    command: tuple[str, ...] = ()
    """Program and arguments; it gets the message on its standard input, and the JSON object in
    TOOLKIT_EVENT: `["mail", "-s", "training", "me@example.org"]`."""
    events: tuple[NotifierEvent, ...] = ("start", "end", "stop", "failure", "stall")
    """What is told of; `stop` is an end before the last step, on request."""
    stall_seconds: float = 900.0
    """Without a step for so long, the run is said to stall; told again when it goes on."""
    timeout: float = 10.0
    """Seconds that sending may take; at the end the process waits no longer."""

    def __post_init__(self) -> None:
        check_positive(self, "stall_seconds", "timeout")
        if self.enabled and not (self.webhook or self.slack or self.command):
            raise ValueError("notifier needs one of webhook, slack and command")
        for name in ("webhook", "slack"):
            url = getattr(self, name)
            if url is not None and not url.startswith(("http://", "https://", "${")):
                raise ValueError(f"{name} must begin with https:// or http://")
