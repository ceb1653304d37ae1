"""`toolkit tune`: which settings train a config fastest here, by real steps of it.

Each try is a process of its own, which may run out of memory without harm. One setting after the
other is changed, and kept where it is faster by more than noise:

1. precision, where it is `auto`;
2. CPU threads of each process;
3. the size of microbatches, as large as memory allows; where memory ends, with activation
   checkpointing;
4. torch.compile;
5. rows of a chunk of the loss.

What a plan says needs more memory than there is, is not tried.
"""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from toolkit import signals
from toolkit.autotune.question import MEASURE, can_compile, machine_is_busy
from toolkit.commands.plan.devices import CPU, DEVICES, find_device
from toolkit.commands.plan.plans import Target, divisors, job_of, plan_of
from toolkit.commands.tune_report import FASTER, Attempt, Report
from toolkit.commands.tune_worker import RESULT, Result, Trial
from toolkit.config.check import check
from toolkit.distributed.launcher import has_launcher
from toolkit.distributed.layout import Layout
from toolkit.distributed.tuning import asked_threads, threads_asked_for
from toolkit.errors import EXIT_DONE, ConfigError, RunError, ToolkitError, TrainingError
from toolkit.experiment.checks import check_experiment, layout_for
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import LoadedExperiment, without_defaults
from toolkit.launch.capacity import capacity_here, check_processes, free_memory
from toolkit.launch.workers import Workers, worker_environments
from toolkit.models.config import ModuleConfig
from toolkit.models.shapes import loss_chunk_rows
from toolkit.storage.atomic import why_not_creatable
from toolkit.storage.foreign import read_json
from toolkit.threads import cores_here
from toolkit.wording import count

_SHARE = 0.8
"""Of the free memory of a machine without GPUs, what tries may take together."""
_LIMIT = 1.1
"""Of a GPU's memory, up to which a plan is tried: plans are a few percent off, and a try that runs
out of memory does no harm there."""
_MOST_SIZES = 5
_SECONDS_TO_END = 5.0
"""How long a try that is asked to stop has: it has nothing to save."""
MICROBATCH, AC, COMPILE = (
    "train_module.rank_microbatch_size",
    "train_module.ac_config",
    "train_module.compile_model",
)
PRECISION, THREADS, CHUNK = (
    "train_module.precision",
    "trainer.num_threads",
    "model.loss_chunk_size",
)
Values = dict[str, Any]
"""Config path -> value."""


class Machine(NamedTuple):
    """What tries run on."""

    device: str
    """A name of `plan/devices.py`."""
    memory: int
    """Bytes of each process."""
    threads: int | None
    """CPU threads of each process that may be changed; None: they may not."""


def tune(
    loaded: LoadedExperiment,
    *,
    steps: int,
    processes: int = 1,
    say: Callable[[str], None] = lambda line: None,
    write: Path | None = None,
) -> Report:
    """Try the settings of `loaded` with `steps` counted steps each on `processes` processes; `say`
    hears of each try. `write`: the file that `write_config` will make.

    Raises ConfigError: the config does not train here, or `write` exists or cannot be written;
    TrainingError: no try worked.
    """
    config, environ = loaded.config, os.environ
    if has_launcher(environ):
        raise ConfigError("tune starts its own processes: run it without a launcher, --processes N")
    for name, number in (("--steps", steps), ("--processes", processes)):
        if number < 1:
            raise ConfigError(f"{name} {number}: give 1 or more")
    if isinstance(config.model, ModuleConfig):
        raise ConfigError("tune is for language models", key="model.type")
    if write is not None and (problem := why_not_creatable(write)) is not None:
        raise ConfigError(f"--write {write}: {problem}; give another name")
    check_processes(processes)
    search = _Search(loaded, steps, processes, say)
    search.run()
    if search.best is None:
        raise TrainingError(f"no try worked; the first: {search.attempts[0].failed}")
    best = search.best
    flags = [f"--{path}={_shown(value)}" for path, value in best.values.items()]
    changed = _changed(loaded.stored, best.values)
    written = without_defaults(changed, {**loaded.origins, **dict.fromkeys(best.values, "tune")})
    return Report(search.attempts, best, flags, written, search.faster)


class _Search:
    """Tries so far, and the best of them."""

    def __init__(
        self, loaded: LoadedExperiment, steps: int, processes: int, say: Callable[[str], None]
    ) -> None:
        self.config, self.steps, self.processes, self.say = loaded.config, steps, processes, say
        self.environ = _environ()
        self.layout = layout_for(self.config, {**os.environ, "WORLD_SIZE": str(processes)})
        check_experiment(self.config, self.layout.batch_ranks, layout=self.layout)
        threads_asked_for(os.environ, self.config.trainer.num_threads)
        self.machine = _machine(processes)
        self.attempts: list[Attempt] = []
        self.best: Attempt | None = None
        self.faster = FASTER
        self.ran_short = False
        """Whether something needed more memory than there is."""

    @property
    def values(self) -> Values:
        return {} if self.best is None else dict(self.best.values)

    def run(self) -> None:
        module = self.config.train_module
        if machine_is_busy():
            self.say("other programs use this machine: what is fastest beside them may not be so")
        self._precisions()
        if self.machine.threads is not None:
            self._threads(self.machine.threads)
        self._microbatches()
        if self.ran_short and module.ac_config is None:
            self._checkpointing()
        elif module.ac_config is not None:
            self.attempt("no activation checkpointing", {AC: None})
        if can_compile():
            is_on = module.compile_model is True
            self.attempt("not compiled" if is_on else "compiled", {COMPILE: not is_on})
        model = self.config.model.to_transformer()
        chunk = loss_chunk_rows(model.loss_chunk_size, model.padded_vocab_size, self.machine.device)
        tokens = self._microbatch()
        for rows in (chunk // 2, chunk * 2):
            if min(rows, tokens) != min(chunk, tokens):  # else one chunk, as it is
                self.attempt(f"loss chunks of {count(rows, 'row')}", {CHUNK: rows})

    def _precisions(self) -> None:
        if self.layout.precision != "auto":
            self.attempt("as configured", {})
            return
        for precision in ("fp32", "bf16"):
            self.attempt(f"precision {precision}", {PRECISION: precision})

    def _threads(self, threads: int) -> None:
        asked = self.config.trainer.num_threads
        if asked is not None and asked != threads:
            threads *= 2  # all of them are a change too
        while threads > 1:
            threads //= 2
            if not self.attempt(count(threads, "thread"), {THREADS: threads}):
                return

    def _microbatches(self, also: Values | None = None, *, larger: bool = False) -> None:
        """Larger ones as long as they are faster, else smaller ones."""
        length = self.config.dataset.sequence_length
        share = self._share()
        current = self._microbatch()
        sizes = [rows * length for rows in divisors(share // length)]
        above = _doublings([size for size in sizes if size > current])
        below = _doublings([size for size in reversed(sizes) if size < current])
        found_larger = False
        for size in above[:_MOST_SIZES]:
            if not self.attempt(_named_size(size, also), {MICROBATCH: size, **(also or {})}):
                break
            found_larger = True
        if larger or (found_larger and self.best is not None):
            return
        for size in below[:_MOST_SIZES]:
            is_faster = self.attempt(f"microbatches of {size:,} tokens", {MICROBATCH: size})
            if self.best is not None and not is_faster:
                return

    def _share(self) -> int:
        """Tokens of a batch on each rank."""
        return self.config.data_loader.global_batch_size // self.layout.batch_ranks

    def _microbatch(self) -> int:
        """Tokens of a microbatch of the best try."""
        asked = self.values.get(MICROBATCH, self.config.train_module.rank_microbatch_size)
        return min(asked or self._share(), self._share())

    def _checkpointing(self) -> None:
        """With memory to spare, larger microbatches may be worth computing blocks twice."""
        kinds: list[Values] = [{"mode": "full"}]
        if self.layout.pp == 1 and self.layout.ep == 1:
            kinds.insert(0, {"mode": "selected_ops"})
        for kind in kinds:
            if self.best is None:
                self.attempt(f"checkpointing {kind['mode']}", {AC: kind})
            self._microbatches({AC: kind}, larger=True)

    def attempt(self, change: str, values: Values) -> bool:
        """Try `values` over the best ones so far; whether they are better."""
        everything = {**self.values, **values}
        attempt = self._tried(change, everything)
        if attempt is None:
            return False
        self.attempts.append(attempt)
        speed = attempt.tokens_per_second
        told = attempt.failed or f"{speed:,.0f} tokens/s"
        self.say(f"{change}: {told}")
        self.ran_short |= attempt.failed is not None and "memory" in attempt.failed
        if speed is None:
            return False
        before = None if self.best is None else self.best.tokens_per_second
        if before is not None and speed < self.faster * before:
            return False
        self.best = attempt if before is not None else self._with_noise(attempt, speed)
        return True

    def _with_noise(self, attempt: Attempt, speed: float) -> Attempt:
        """The first try that works, with the best of two turns: changes have to win more than what
        lies between them."""
        again = self._tried(attempt.change, attempt.values)
        other = None if again is None else again.tokens_per_second
        if again is None or other is None:
            return attempt
        apart = max(speed, other) / min(speed, other)
        if apart > FASTER:
            self.faster = apart
            self.say(f"once more: {other:,.0f} tokens/s; a gain has to be larger than that")
        if other > speed:
            self.attempts[-1] = attempt = again
        return attempt

    def _tried(self, change: str, values: Values) -> Attempt | None:
        """None where the config cannot be so, or is so already."""
        given = Attempt(change=change, values=values)
        try:
            config = _changed(self.config, values)
            layout = layout_for(config, {**os.environ, "WORLD_SIZE": str(self.processes)})
            check_experiment(config, layout.batch_ranks, layout=layout)
        except ConfigError:
            if not values:
                raise
            return None
        if self.best is not None and config == _changed(self.config, self.values):
            return None
        needed = _planned(config, layout, self.machine, self.processes)
        margin = 1.0 if self.machine.device == CPU else _LIMIT
        if needed is not None and needed > margin * self.machine.memory:
            gib = needed / 2**30, self.machine.memory / 2**30
            short = "not tried: the plan needs {:.1f} GiB of memory, there are {:.1f}".format(*gib)
            return msgspec.structs.replace(given, failed=short)
        result = _run(config, self.steps, self.processes, self.machine, self.environ)
        return msgspec.structs.replace(
            given,
            tokens_per_second=result.tokens_per_second,
            peak_memory=result.peak_memory,
            failed=result.failed,
        )


def _environ() -> dict[str, str]:
    """What a try sees: it measures nothing itself."""
    return {**os.environ, MEASURE: "0"}


def _machine(processes: int) -> Machine:
    capacity = capacity_here()
    if capacity.gpus:
        import torch

        memory = torch.cuda.get_device_properties(0).total_memory
        title = torch.cuda.get_device_name(0)
        name = next((d.name for d in DEVICES.values() if d.title == title), "h100")
        return Machine(name, memory, None)
    threads = max(1, cores_here() // processes)
    memory = int(_SHARE * free_memory() / processes)
    return Machine(CPU, memory, None if asked_threads(os.environ) else threads)


def _planned(
    config: ExperimentConfig, layout: Layout, machine: Machine, processes: int
) -> float | None:
    """Bytes that the plan says; None: no plan knows the model's parts."""
    device = find_device(machine.device, processes)._replace(memory=machine.memory)
    try:
        return plan_of(job_of(config, layout, Target(device, processes))).memory.total
    except ToolkitError:
        return None


def _run(
    config: ExperimentConfig,
    steps: int,
    processes: int,
    machine: Machine,
    environ: Mapping[str, str],
) -> Result:
    memory = machine.memory if machine.device == CPU else None
    trial = Trial(config=config.to_dict(), steps=steps, memory=memory, parent=os.getpid())
    with tempfile.TemporaryDirectory(prefix="toolkit-tune-") as name:
        folder = Path(name)
        (folder / "try.json").write_bytes(msgspec.json.encode(trial))
        command = [sys.executable, "-m", "toolkit.commands.tune_worker", str(folder / "try.json")]
        environments = [environ]
        if processes > 1:
            environments = [*worker_environments(environ, processes, folder)]
        with (folder / "errors").open("w+b") as errors:
            with contextlib.ExitStack() as stack:
                with signals.holding_back():
                    workers = Workers(command, environments, output=errors)
                    stack.enter_context(signals.listening(workers))
                failed = workers.wait(_SECONDS_TO_END)
            if workers.reason is not None:
                raise signals.Interrupted(workers.reason)
            errors.seek(0)
            lines = errors.read()[-4000:].decode(errors="replace").strip().splitlines()
        try:
            return read_json(folder / RESULT, RunError, Result)
        except FileNotFoundError:
            code = EXIT_DONE if failed is None else failed.code
            if code == -signal.SIGKILL:
                return Result(failed="killed: out of memory?")
            return Result(failed=lines[-1] if lines else f"ended with code {code}")


def _changed(config: ExperimentConfig, values: Values) -> ExperimentConfig:
    data = config.to_dict()
    for path, value in values.items():
        *sections, last = path.split(".")
        place = data
        for section in sections:
            place = place[section]
        place[last] = value
    checked = check(data, ExperimentConfig)
    for error in checked.errors:
        raise error
    return checked.config


def _doublings(sizes: list[int]) -> list[int]:
    """Of sizes in order, those that are at least twice, or at most half, of the one before."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size >= 2 * kept[-1] or 2 * size <= kept[-1]:
            kept.append(size)
    return kept


def _named_size(size: int, also: Values | None) -> str:
    mode = f", checkpointing {also[AC]['mode']}" if also else ""
    return f"microbatches of {size:,} tokens{mode}"


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return f"'{text}'" if isinstance(value, dict) else text.strip('"')
