"""Recorded losses against replayed ones, and the receipt of the comparison."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from toolkit.config.secrets import mask_secrets
from toolkit.distributed.config import PARALLEL_FIELDS
from toolkit.distributed.devices import usable_gpus
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.recorded import (
    VERSIONED,
    EngineRecord,
    RecordedStep,
    engine_of,
    read_steps,
    versions_of,
)
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lock import utc_now
from toolkit.storage.atomic import write_json_atomic

BIT_FOR_BIT = "bit for bit"
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
"""Relative, by precision: what other orders of summation may change in a loss."""

_DECIDING = {
    "name": "engine",
    "world_size": "processes",
    "precision": "precision",
    "threads": "threads",
    "device": "device",
}
"""Fields of `EngineRecord` that decide rounding, in words."""


class ReplayPlan(NamedTuple):
    """Which steps are run again, and how they were run."""

    folder: Path
    checkpoint: Path
    step: int
    """Of the checkpoint."""
    recorded: list[RecordedStep]
    """The steps to run again, in order."""
    config: ExperimentConfig
    engine: EngineRecord | None
    """None: an older toolkit, which did not record it."""
    versions: dict[str, str | None]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    step: int
    recorded: float | str | None
    replayed: float | str | None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Content of metadata/verify-replay-step{S}.json."""

    verdict: Literal["equal", "differs"]
    comparison: str
    """`bit for bit`, or the tolerance."""
    reasons: list[str]
    """Why not bit for bit."""
    checkpoint: str
    first_step: int
    last_step: int
    compared: int
    largest_difference: float
    """Relative."""
    first_difference: Difference | None
    recorded: EngineRecord | None
    replayed: EngineRecord
    recorded_versions: dict[str, str | None]
    replayed_versions: dict[str, str | None]
    time: str
    """UTC."""

    @property
    def file(self) -> str:
        """Where in the run folder it is."""
        return f"{RUN_FILES.metadata}/verify-replay-{self.checkpoint}.json"


def compare(plan: ReplayPlan, again: Path) -> Receipt:
    """Compare the record with `again`, the run folder of the replay, and write the receipt."""
    replayed = read_steps(again)
    engine = engine_of(again, 1)
    assert engine is not None, "this toolkit records it"
    versions = versions_of(again, 1)
    reasons = _rounding_reasons(plan, engine, versions)
    precisions = {engine.precision, plan.engine.precision if plan.engine else engine.precision}
    tolerance = max(TOLERANCES.get(name, 0.0) for name in precisions) if reasons else 0.0
    largest, first = 0.0, None
    for line in plan.recorded:
        loss = replayed[line.step].loss if line.step in replayed else None
        difference = relative_difference(line.loss, loss)
        largest = max(largest, difference)
        if difference > tolerance and first is None:
            first = Difference(step=line.step, recorded=line.loss, replayed=loss)
    receipt = Receipt(
        verdict="equal" if first is None else "differs",
        comparison=f"within a relative {tolerance:g}" if reasons else BIT_FOR_BIT,
        reasons=reasons,
        checkpoint=plan.checkpoint.name,
        first_step=plan.recorded[0].step,
        last_step=plan.recorded[-1].step,
        compared=len(plan.recorded),
        largest_difference=largest,
        first_difference=first,
        recorded=plan.engine,
        replayed=engine,
        recorded_versions=plan.versions,
        replayed_versions=versions,
        time=utc_now(),
    )
    write_json_atomic(plan.folder / receipt.file, mask_secrets(msgspec.to_builtins(receipt)))
    return receipt


def relative_difference(recorded: Any, replayed: Any) -> float:
    """0 for equal values; infinite where one is missing or not finite and the other is not."""
    if recorded == replayed:
        return 0.0
    if not isinstance(recorded, float | int) or not isinstance(replayed, float | int):
        return float("inf")
    return abs(recorded - replayed) / max(abs(recorded), abs(replayed))


def _rounding_reasons(
    plan: ReplayPlan, engine: EngineRecord, versions: dict[str, str | None]
) -> list[str]:
    before = plan.engine
    if before is None:
        return ["the run did not record its engine"]
    reasons = [
        f"{label}: {getattr(before, name)} then, {getattr(engine, name)} now"
        for name, label in _DECIDING.items()
        if getattr(before, name) != getattr(engine, name)
    ]
    for name in PARALLEL_FIELDS if not reasons else ():
        if getattr(before, name) != getattr(engine, name):
            reasons.append(f"other settings of the engine ({name})")
    if before.kernels and before.kernels != engine.kernels:
        reasons.append("other kernels (metadata/engine.json names them)")
    reasons += [
        f"{name}: {plan.versions.get(name)} then, {versions.get(name)} now"
        for name in VERSIONED
        if plan.versions.get(name) != versions.get(name)
    ]
    if not plan.config.trainer.deterministic and usable_gpus():
        reasons.append("trainer.deterministic is off, and GPU kernels sum in any order then")
    return reasons
