"""How `prepare` shows what it does: a bar on a terminal, a few plain lines elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

from toolkit.data.prepare.build.worker import Job
from toolkit.data.tokens.prepared import PreparedDataset, nothing_held_out
from toolkit.wording import count

if TYPE_CHECKING:
    import rich.progress

PLAIN_LINE_SECONDS = 30.0


class Progress:
    """Progress of one preparation, on standard error."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._console = Console(stderr=True, highlight=False)
        self._bar: rich.progress.Progress | None = None
        self._started = self._last_line = time.monotonic()
        self._done = self._total = self._finished_before = 0

    def __enter__(self) -> "Progress":
        if self._enabled and self._console.is_terminal:
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, line: str) -> None:
        """One line of its own."""
        if self._enabled:
            self._console.print(line, markup=False, soft_wrap=True)

    def start(self, folder: str, jobs: Sequence[Job], missing: Sequence[Job]) -> None:
        """Encoding begins; jobs that are not missing were finished before."""
        self._total = sum(_num_bytes(job) for job in jobs)
        self._done = self._finished_before = self._total - sum(_num_bytes(job) for job in missing)
        continued = len(jobs) - len(missing)
        again = f", {continued} of {len(jobs)} parts were finished before" if continued else ""
        self.note(f"preparing {folder}: {self._total / 1e6:.1f} MB of text{again}")
        self._started = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.add_task("encoding", total=self._total or None, completed=self._done)

    def advance(self, job: Job) -> None:
        """One more part is complete."""
        self._done += _num_bytes(job)
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[-1], completed=self._done)
        elif now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            speed = (self._done - self._finished_before) / (now - self._started)
            self.note(
                f"encoded {self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB, "
                f"{speed / 1e6:.1f} MB/s"
            )

    def finish(self, prepared: PreparedDataset) -> None:
        """What was made."""
        manifest = prepared.manifest
        seconds = time.monotonic() - self._started
        counts = ", ".join(
            f"{split} {count(info.num_tokens, 'token')} in {count(info.num_documents, 'document')}"
            for split, info in manifest.splits.items()
        )
        self.note(f"prepared {prepared.folder}: {counts}; {seconds:.1f} s")
        if manifest.replaced_bytes:
            was = "was" if manifest.replaced_bytes == 1 else "were"
            self.note(f"{count(manifest.replaced_bytes, 'byte')} {was} not UTF-8 and became U+FFFD")
        if manifest.cut_documents:
            self.note(
                f"{count(manifest.cut_documents, 'document')} made by cutting those over 8 MB; an "
                "end-of-document token stands at each cut"
            )
        left_out = {"empty": manifest.skipped_documents, **manifest.filtered_documents}
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in left_out.items() if number)
        if reasons:
            self.note(f"documents left out: {reasons}")
        not_held_out = nothing_held_out(prepared)
        if not_held_out is not None:
            self.note(not_held_out)


def _num_bytes(job: Job) -> int:
    return sum(part.num_bytes for part in job.shard)
