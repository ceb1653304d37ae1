"""What `auto` means for a run: rank 0 asks `toolkit.autotune`, and all ranks take its answer.

No torch at import: a dry run looks into the cache too.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from toolkit.autotune import cache
from toolkit.autotune.choices import Choices
from toolkit.autotune.choose import (
    Answer,
    choose,
    decide,
    describe,
    needs_timings,
    recorded_for,
    unmeasured,
)
from toolkit.autotune.question import Aspect, Question, machine_is_busy, measures, work_of
from toolkit.config.named import named
from toolkit.data.corpus_info import planned_batches
from toolkit.distributed.layout import Layout
from toolkit.distributed.tuning import asked_threads, cpu_details, cpu_name
from toolkit.errors import ToolkitError
from toolkit.metrics.flops import device_peak_flops
from toolkit.models.config import ClassModelConfig, ModuleConfig
from toolkit.runs.environment import installed_version
from toolkit.runs.status import read_status
from toolkit.storage.foreign import reason_of
from toolkit.storage.remote import is_url
from toolkit.threads import cores_here

_FLOPS_SHARE = 0.35
"""Of a GPU's peak, what an eager step reaches."""
PATHS: dict[Aspect, str] = {
    "precision": "train_module.precision",
    "compile_model": "train_module.compile_model",
    "threads": "trainer.num_threads",
}
"""Of config values that may be `auto` (null: of threads)."""


_PARTS = ("model", "train_module", "trainer", "dataset", "data_loader", "data")
"""Of an `ExperimentConfig`, what decides."""


def question_of(
    config: Any,
    layout: Layout,
    *,
    device: str,
    name: str,
    local_world_size: int = 1,
    environ: Mapping[str, str] = os.environ,
) -> Question | None:
    """What an `ExperimentConfig` leaves open on a `device` (torch's type) called `name`; None where
    nothing is chosen: of models that are no Transformers, and settings of a script that lack a
    section of it."""
    if any(getattr(config, part, None) is None for part in _PARTS):
        return None
    model = config.model
    if isinstance(model, ModuleConfig) or device not in ("cpu", "cuda"):
        return None
    module, trainer, model = config.train_module, config.trainer, model.to_transformer()
    asks: set[Aspect] = set()
    if layout.precision == "auto" and module.float8_config is None:
        asks.add("precision")
    asked = (asked_threads(environ) or trainer.num_threads) if device == "cpu" else None
    if device == "cpu" and asked is None:
        asks.add("threads")
    if device == "cuda" and model.is_plain_softmax and layout.cp == 1:
        asks.add("attention")
    if module.compile_model == "auto" and may_compile(config, layout):
        asks.add("compile_model")
    length = config.dataset.sequence_length
    share = config.data_loader.global_batch_size // layout.batch_ranks
    tokens = min(module.rank_microbatch_size or share, share)
    work = work_of(model, tokens=tokens, length=length, tp=layout.tp)
    peak = device_peak_flops(name) or 100e12
    flops = model.flops_per_token(length) * share
    return Question(
        asks=frozenset(asks),
        device=device,
        name=name,
        details=cpu_details() if device == "cpu" else "",
        torch=installed_version("torch") or "",
        products=work.products,
        attention=work.attention,
        head=work.head,
        threads=asked or threads_share(local_world_size),
        precision=_computed_in(layout, asks),
        steps=_steps_of(config),
        passes=max(1, share // tokens),
        estimate=flops / (_FLOPS_SHARE * peak),
    )


def may_compile(config: Any, layout: Layout) -> bool:
    """Whether `auto` may compile: dense models of ours under plain data parallelism, whose compiled
    steps compute the same, with nothing that would be compiled again and again."""
    module, loader, dataset = config.train_module, config.data_loader, config.dataset
    kind = dataset.instances.to_dict()["type"] if dataset.custom is None else "custom"
    changes = module.schedules or loader.sequence_length_schedule or loader.batch_size_schedule
    adds = (module.ac_config, module.float8_config, module.lora, module.target)
    return (
        layout.name in ("single", "ddp", "fsdp")
        and kind in ("fixed", "packed")  # all rows have one length
        and max(layout.pp, layout.cp, layout.tp, layout.ep) == 1
        and not isinstance(config.model, ClassModelConfig)
        and config.model.to_transformer().moe is None
        and not changes
        and not any(part is not None for part in adds)
        and not module.activation_offload
        and not layout.dp_config.cpu_offload
    )


def threads_share(local_world_size: int) -> int:
    """CPU threads of each of so many processes on this machine."""
    return max(1, cores_here() // local_world_size)


def save_folder_of(config: Any) -> Path | None:
    """The run folder that a config names by itself; None: a new one, or a script's own."""
    folder = getattr(getattr(config, "run", None), "save_folder", None)
    return None if folder is None or is_url(folder) else Path(folder)


def recorded_choices(run: Path | None) -> Choices | None:
    """What the run in a folder has chosen before; None: it has chosen nothing yet."""
    try:
        status = None if run is None else read_status(run)
        if status is None:
            return None
        if status.other.get("chosen") is not None:
            return msgspec.convert(status.other["chosen"], Choices)
        # Of a release that recorded no more.
        goes_on = status.step or status.attempt > 1
        precision = status.other.get("precision") if goes_on else None
        return Choices(precision=precision) if precision in ("fp32", "bf16", "fp16") else None
    except (ToolkitError, OSError, msgspec.ValidationError):
        return None


def answer_of(
    config: Any,
    layout: Layout,
    device: Any,
    *,
    fixed: str,
    name: str,
    local_world_size: int = 1,
    run_dir: Path | None = None,
    anew: frozenset[Aspect] = frozenset(),
) -> Answer:
    """What rank 0 chooses on the torch `device` called `name`. Never raises, since the other ranks
    wait for its answer: where anything goes wrong, what is recorded stays and the rest is as it is
    without measuring, with a notice."""
    recorded = None
    try:
        question = question_of(
            config, layout, device=device.type, name=name, local_world_size=local_world_size
        )
        if question is None:
            return Answer(Choices())
        recorded = recorded_choices(run_dir or save_folder_of(config))
        question = _without_attention_of_others(question, config, device, fixed)
        if measures():
            return choose(
                question,
                lambda part: named("toolkit.autotune.measure:measure")(part, device),
                fixed=fixed,
                recorded=recorded,
                anew=anew,
            )
        if recorded is None:
            return Answer(unmeasured(question, fixed))
        return Answer(recorded_for(question, recorded, fixed))
    except Exception as error:
        settled: Any = fixed if layout.precision == "auto" else None
        notice = f"auto could not measure: {reason_of(error)}"
        return Answer(recorded or Choices(precision=settled), (notice,))


def _without_attention_of_others(
    question: Question, config: Any, device: Any, precision: str
) -> Question:
    """`question`, which asks for SDPA's kernel only where that counts."""
    import torch

    from toolkit.distributed.devices import compute_dtype
    from toolkit.models.sdpa import takes_measured_here

    counts = takes_measured_here(
        config.train_module.attention_backend,
        device,
        dtype=compute_dtype(precision) or torch.float32,
        head_dim=question.attention.head_dim,
    )
    asks = question.asks if counts else question.asks - {"attention"}
    return msgspec.structs.replace(question, asks=asks)


def foreseen(config: Any, layout: Layout, environ: Mapping[str, str]) -> str | None:
    """The precision, and what else a start on this machine's CPU would choose, as far as the cache
    knows; None where nothing is measured."""
    size = int(environ.get("LOCAL_WORLD_SIZE") or layout.world_size)
    question = question_of(
        config, layout, device="cpu", name=cpu_name(), local_world_size=size, environ=environ
    )
    if question is None or not needs_timings(question) or not measures():
        return None
    timings = cache.find(question.key)
    if timings is None:
        busy = " (other programs use this machine: not kept then)" if machine_is_busy() else ""
        return f"auto: measured at start{busy}"
    parts = describe(question, decide(question, timings, "fp32"), timings)
    return ", ".join(parts).removeprefix("precision ")


def _computed_in(layout: Layout, asks: set[Aspect]) -> str:
    """What a CPU computes in; `auto` where that is asked."""
    is_settled = layout.precision == "auto" and "precision" not in asks
    return "fp32" if is_settled else layout.precision


def _steps_of(config: Any) -> int | None:
    """Optimizer steps of the run; None where its length is told in epochs of data."""
    batches = planned_batches(config.data, None)
    durations = [config.trainer.max_duration, config.trainer.hard_stop]
    try:
        return min(batches.steps_of(d.value, d.unit) for d in durations if d is not None)
    except (ValueError, ToolkitError):
        return None
