"""What a run would take of each source of its mixture, told before it runs."""

from fractions import Fraction

import msgspec

from toolkit.data.corpus_info import check_same_tokens, planned_batches
from toolkit.data.instances.open import count_instances
from toolkit.data.order.mixture import MixPlan, check_limits
from toolkit.data.order.resolve import resolve_mix, resolve_schedule
from toolkit.data.prepare.corpus import prepare_corpus
from toolkit.data.tokens.prepared import PreparedDataset, dataset_folder, localize, read_prepared
from toolkit.errors import ConfigError
from toolkit.experiment.config import ExperimentConfig


class SourcePreview(msgspec.Struct, frozen=True, kw_only=True):
    """One source of the mixture. Tokens count whole instances; None: not known yet."""

    name: str
    shares: tuple[float, ...]
    """Its share of the mixture in each segment."""
    folder: str
    is_prepared: bool
    num_documents: int | None
    available_tokens: int | None
    """Tokens that are used (see `max_tokens`)."""
    taken_tokens: int | None
    """Tokens that the whole run takes, repeated ones included."""
    repetitions: float | None
    """How many times the run goes through them."""
    max_repetitions: float | None


class MixPreview(msgspec.Struct, frozen=True, kw_only=True):
    sources: list[SourcePreview]
    segment_starts: tuple[int, ...]
    """Tokens trained on where each segment of the schedule begins."""
    total_tokens: int | None
    """Tokens of the whole run; None while that is not known."""
    broken_limit: str | None
    """What is wrong, in a line, where a source is repeated more than it may be."""


def preview_mix(config: ExperimentConfig, *, prepare: bool) -> MixPreview:
    """What training with `config` takes of each source of `dataset.mix`. With `prepare`, sources
    that are not there yet are prepared; else they are shown without numbers."""
    dataset = localize(config.dataset, config.store)
    sources, segments = resolve_mix(dataset), resolve_schedule(dataset)
    found: dict[str, PreparedDataset] = {}
    if prepare:
        parts = prepare_corpus(config.data, work_dir=config.run.work_dir).parts
        found = {name: prepared for name, (_, prepared) in parts.items()}
    else:
        there = {source.name: read_prepared(source.dataset) for source in sources}
        found = {name: prepared for name, prepared in there.items() if prepared is not None}
        if found:
            check_same_tokens(found)
    counts = {
        source.name: number
        for source in sources
        if source.name in found
        and (number := count_instances(found[source.name], "train", source.dataset)) is not None
    }
    # Of sources that are not known yet, the shares still are.
    limited = [s if s.name in counts else s._replace(max_repetitions=None) for s in sources]
    plan = MixPlan(limited, segments, {s.name: counts.get(s.name, 0) for s in sources})
    length, all_known = plan.sequence_length, len(counts) == len(sources)
    total, batch = _run_instances(config, plan.epoch_instances if all_known else None)
    taken: dict[str, int] = {}
    epochs: dict[str, float] = {}
    broken = None
    if total is not None:
        taken, epochs = plan.counts(total), plan.epochs(total)
        try:
            check_limits(plan, total, batch_instances=batch)
        except ConfigError as error:
            broken = str(error)
    rows = [
        SourcePreview(
            name=(name := source.name),
            shares=tuple(float(segment.shares[name]) for segment in segments),
            folder=str(dataset_folder(source.dataset)),
            is_prepared=name in found,
            num_documents=found[name].num_documents("train") if name in found else None,
            available_tokens=plan.available[name] * length if name in counts else None,
            taken_tokens=taken[name] * length if name in taken else None,
            repetitions=epochs.get(name) if name in counts else None,
            max_repetitions=source.max_repetitions,
        )
        for source in sources
    ]
    return MixPreview(
        sources=rows,
        segment_starts=tuple(segment.at_tokens for segment in segments),
        total_tokens=total * length if total is not None else None,
        broken_limit=broken,
    )


def _run_instances(config: ExperimentConfig, epoch_instances: int | None) -> tuple[int | None, int]:
    """Those of the whole run, and of a batch at its end."""
    batches, duration = planned_batches(config.data, epoch_instances), config.trainer.max_duration
    if duration.unit == "epochs" and not batches.knows_epochs:
        return None, 1
    steps = batches.steps_of(duration.value, duration.unit)
    return batches.plan.consumed(steps), batches.plan.segment(steps).batch_instances


def share_text(share: float) -> str:
    """`12.5%`, with as many digits as small shares need."""
    percent = Fraction(share) * 100
    digits = 2
    while percent and percent * 10**digits < 10 and digits < 7:
        digits += 1
    return f"{float(percent):.{digits}f}".rstrip("0").rstrip(".") + "%"
