"""Where each batch lies in a stream of instances: arithmetic, without the stream.

A stream is cut into batches. Where their size changes, by a schedule or on resume, a new segment
begins with the next unused instance. A short list of segments tells all batches, those to come as
well, and any of them is found in constant time.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self


def batch_that_fits(instances: int, length: int, ranks: int, rows: int = 1) -> int:
    """Tokens of the largest batch that `instances` of `length` tokens make over `ranks` ranks, each
    with a multiple of `rows` of them; 0: none."""
    return instances // ranks // rows * rows * ranks * length


class Segment(NamedTuple):
    """Batches of one size, of rows of one length."""

    first_batch: int
    position: int
    """Stream position of its first instance."""
    batch_instances: int
    row_split: int = 1
    """Rows that each instance is cut into."""


class Phase(NamedTuple):
    """What a schedule asks for from a point of training on."""

    start: int
    """Instances used before; it takes effect at the first batch that begins there or later."""
    batch_instances: int
    row_split: int = 1


class BatchPlan:
    """Segments of batches over a stream of epochs.

    Attributes:
        segments: where batches change; at least the first one.
        epoch_instances: instances of one epoch.
        keeps_epochs_apart: whether no batch spans two epochs (the rest of an epoch is dropped).
    """

    def __init__(
        self, segments: Sequence[Segment], *, epoch_instances: int, keeps_epochs_apart: bool
    ) -> None:
        self.segments = tuple(segments)
        self.epoch_instances = epoch_instances
        self.keeps_epochs_apart = keeps_epochs_apart
        # Of the last batch size.
        self.steps_per_epoch, rest = divmod(epoch_instances, segments[-1].batch_instances)
        self.dropped_instances = rest if keeps_epochs_apart else 0

    def with_segments(self, segments: Sequence[Segment]) -> Self:
        """The same stream in other batches."""
        return type(self)(
            segments,
            epoch_instances=self.epoch_instances,
            keeps_epochs_apart=self.keeps_epochs_apart,
        )

    def continued(self, segments: Sequence[Segment], batch: int, phases: Sequence[Phase]) -> Self:
        """This stream with the history `segments` before number `batch`, and from there on what
        `phases` ask for (the first one from the start)."""
        kept = [segment for segment in segments if segment.first_batch < batch]
        used = position = 0
        while True:
            if kept:
                plan = self.with_segments(kept)
                used, position = plan.consumed(batch), plan.next_position(batch)
            number = max(n for n, phase in enumerate(phases) if phase.start <= used)
            asked = Segment(batch, position, *phases[number][1:])
            if not kept or kept[-1][2:] != asked[2:]:
                kept.append(asked)
            if number + 1 == len(phases):
                return self.with_segments(kept)
            batch += -(-(phases[number + 1].start - used) // asked.batch_instances)

    def segment(self, batch: int) -> Segment:
        return next(s for s in reversed(self.segments) if s.first_batch <= batch)

    def consumed(self, batches: int) -> int:
        """Instances of the first `batches` batches."""
        starts = [segment.first_batch for segment in self.segments]
        ends = [min(batches, start) for start in starts[1:]] + [batches]
        return sum(
            max(0, end - segment.first_batch) * segment.batch_instances
            for segment, end in zip(self.segments, ends, strict=True)
        )

    def batches_until(self, instances: int) -> int:
        """How many batches hold `instances` instances or more."""
        for segment, after in itertools.zip_longest(self.segments, self.segments[1:]):
            left = instances - self.consumed(segment.first_batch)
            end = segment.first_batch + max(0, -(-left // segment.batch_instances))
            if after is None or end <= after.first_batch:
                return end
        raise AssertionError("there is a last segment")

    def position(self, batch: int) -> int:
        """Stream position of the first instance of `batch`."""
        segment = self.segment(batch)
        size, total = segment.batch_instances, self.epoch_instances
        number = batch - segment.first_batch
        epoch, whole = self._first_epoch(segment)
        if number < whole or not self.keeps_epochs_apart:
            return segment.position + number * size
        later, place = divmod(number - whole, max(1, total // size))
        return (epoch + 1 + later) * total + place * size

    def next_position(self, batch: int) -> int:
        """Stream position after the last instance that batches before `batch` used."""
        if batch == 0:
            return 0
        return self.position(batch - 1) + self.segment(batch - 1).batch_instances

    def epochs_done(self, batches: int) -> float:
        """Passes over the data that the first `batches` batches are; whole numbers where no whole
        batch of an epoch is left. Never less than before: smaller batches that still fit into an
        epoch which larger ones have ended add nothing."""
        if not self.keeps_epochs_apart or batches == 0:
            return self.next_position(batches) / self.epoch_instances
        starts = [segment.first_batch for segment in self.segments[1:]]
        ends = [start for start in starts if start < batches] + [batches]
        return max(map(self._epochs_at, ends))

    def _epochs_at(self, batches: int) -> float:
        """As the last of `batches` batches has it."""
        total, used = self.epoch_instances, self.next_position(batches)
        segment = self.segment(batches - 1)
        epoch = (used - 1) // total
        first_epoch, whole = self._first_epoch(segment)
        end = total - total % segment.batch_instances
        if epoch == first_epoch:
            end = segment.position + whole * segment.batch_instances - epoch * total
        return epoch + (used - epoch * total) / end

    def epoch_end(self, epochs: int) -> int:
        """Number of batches until `epochs` passes over the data are done."""
        end = 0
        for segment, after in itertools.zip_longest(self.segments, self.segments[1:]):
            end = self._epoch_end_in(segment, epochs)
            # A smaller batch may still fit into what the last one of a segment leaves.
            if after is None or end < after.first_batch:
                break
        return end

    def epoch_of(self, batch: int) -> tuple[int, int]:
        """(epoch, number in it) of a batch, both from 0."""
        epoch, place = divmod(self.position(batch), self.epoch_instances)
        return epoch, place // self.segment(batch).batch_instances

    def _epoch_end_in(self, segment: Segment, epochs: int) -> int:
        """Where `epochs` passes end, if the segment goes on until then."""
        total, size = self.epoch_instances, segment.batch_instances
        if not self.keeps_epochs_apart:
            return segment.first_batch + max(0, (epochs * total - segment.position) // size)
        first_epoch, whole = self._first_epoch(segment)
        if epochs <= first_epoch:
            return segment.first_batch
        per_epoch = total // size
        return segment.first_batch + whole + (epochs - first_epoch - 1) * per_epoch

    def _first_epoch(self, segment: Segment) -> tuple[int, int]:
        """(number of the epoch a segment begins in, whole batches of it that are left)."""
        epoch, used = divmod(segment.position, self.epoch_instances)
        return epoch, (self.epoch_instances - used) // segment.batch_instances


class Batches:
    """The batches of a run in numbers: sizes, lengths, tokens and epochs, and durations as steps.

    Step n trains on batch n - 1.
    """

    def __init__(
        self, plan: BatchPlan, sequence_length: int, *, no_epochs: str | None = None
    ) -> None:
        """`sequence_length`: tokens of an instance. `no_epochs`: why it is not known how long an
        epoch is; None: it is."""
        self.plan, self.sequence_length, self._no_epochs = plan, sequence_length, no_epochs

    @property
    def knows_epochs(self) -> bool:
        """Whether it is known how long an epoch is."""
        return self._no_epochs is None

    def steps_of(self, value: int, unit: Literal["steps", "tokens", "epochs"]) -> int:
        """Number of the step that ends a duration, counted from the beginning of the run. Raises
        ValueError: epochs, and how long one is is not known."""
        if unit == "steps":
            return value
        if unit == "tokens":
            return self.plan.batches_until(-(-value // self.sequence_length))
        if self._no_epochs is not None:
            raise ValueError(self._no_epochs)
        return self.plan.epoch_end(value)

    def tokens_done(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        return self.plan.consumed(steps) * self.sequence_length

    def epochs_done(self, steps: int) -> float:
        """Passes over the data that the first `steps` steps are; 0.0 where that is not known."""
        return 0.0 if self._no_epochs is not None else self.plan.epochs_done(steps)

    def batch_tokens(self, batch: int) -> int:
        """Tokens of a global batch."""
        return self.plan.segment(batch).batch_instances * self.sequence_length

    def sizes(self, batch: int) -> dict[str, int]:
        """Those of the batch's sizes that change during the run, by the names of their settings."""
        segments = self.plan.segments
        found: dict[str, int] = {}
        if len(segments) == 1:
            return found
        if len({segment.batch_instances for segment in segments}) > 1:
            found["global_batch_size"] = self.batch_tokens(batch)
        if len({segment.row_split for segment in segments}) > 1:
            found["sequence_length"] = self.row_length(batch)
        return found

    def row_length(self, batch: int) -> int:
        """Tokens of a row of it; of instances of variable length, of the longest."""
        return self.sequence_length // self.plan.segment(batch).row_split
