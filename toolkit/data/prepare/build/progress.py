"""How a preparation shows what it does on standard error: a bar on a terminal, a few lines
elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from toolkit.data.prepare.build.parts import Job
from toolkit.data.tokens.prepared import PreparedDataset, nothing_held_out
from toolkit.data.tokens.units import documents_per_unit
from toolkit.storage.progress import byte_progress
from toolkit.wording import count

LINE_SECONDS = 30.0

Note = Callable[[str], None]
"""Shows one line."""


def printer(*, enabled: bool) -> Note:
    """Prints lines, or nothing."""
    console = Console(stderr=True, highlight=False)
    return lambda line: console.print(line, markup=False, soft_wrap=True) if enabled else None


@contextlib.contextmanager
def encoding(
    where: str, jobs: Sequence[Job], missing: Sequence[Job], note: Note, *, enabled: bool
) -> Iterator[Callable[[Job], None]]:
    """Shows how encoding goes on; yields what is called with each job that is done. Jobs that are
    not missing were done before."""
    total, left = (sum(job.num_bytes for job in some) for some in (jobs, missing))
    continued = len(jobs) - len(missing)
    again = f", {continued} of {len(jobs)} parts were finished before" if continued else ""
    note(f"preparing {where}: {total / 1e6:.1f} MB of text{again}")
    started = last_line = time.monotonic()
    done = 0
    has_bar = enabled and Console(stderr=True).is_terminal
    with byte_progress("encoding", total, done=total - left, enabled=enabled) as advance_bar:

        def advance(job: Job) -> None:
            nonlocal done, last_line
            done += job.num_bytes
            advance_bar(job.num_bytes)
            now = time.monotonic()
            if not has_bar and now - last_line >= LINE_SECONDS:
                last_line = now
                speed, so_far = done / (now - started) / 1e6, (total - left + done) / 1e6
                note(f"encoded {so_far:.0f} of {total / 1e6:.0f} MB, {speed:.1f} MB/s")

        yield advance


def summary(prepared: PreparedDataset, seconds: float) -> Iterator[str]:
    """What was made, line by line."""
    manifest = prepared.manifest
    # The only split may be of text that is evaluated and never trained on.
    filled = {split: info for split, info in manifest.splits.items() if info.num_tokens}
    step = documents_per_unit(prepared.unit)
    name = {None: "document", "pair": "pair", "binary": "labelled row"}[prepared.unit]
    counts = ", ".join(
        f"{f'{split} ' if len(filled) > 1 else ''}{count(info.num_tokens, 'token')} in "
        f"{count(info.num_documents // step, name)}"
        for split, info in (filled or manifest.splits).items()
    )
    yield f"prepared {prepared.folder}: {counts}; {seconds:.1f} s"
    asked = [(info.num_targets or 0, info.num_tokens) for info in manifest.splits.values()]
    if manifest.audit is not None:
        targets, tokens = (sum(numbers) for numbers in zip(*asked, strict=True))
        yield f"targets: {targets:,} of {count(tokens, 'token')}, {targets / tokens:.1%}"
    if manifest.replaced_bytes:
        was = "was" if manifest.replaced_bytes == 1 else "were"
        yield f"{count(manifest.replaced_bytes, 'byte')} {was} not UTF-8 and became U+FFFD"
    if manifest.cut_documents:
        yield (
            f"{count(manifest.cut_documents, 'document')} made by cutting those over 8 MB; an "
            "end-of-document token stands at each cut"
        )
    left_out = {"empty": manifest.skipped_documents, **manifest.filtered_documents}
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in left_out.items() if number)
    if reasons:
        what = "documents" if prepared.unit is None else "rows"
        yield f"{what} left out: {reasons}"
    not_held_out = nothing_held_out(prepared)
    if not_held_out is not None:
        yield not_held_out
