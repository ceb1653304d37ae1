"""The four streams of metrics of a run: train, eval, network, system.

Each is a file of JSON lines and a folder of TensorBoard events.
"""

import contextlib
import logging
import threading
from collections.abc import Collection
from pathlib import Path

from toolkit.metrics.events import TensorBoardSink
from toolkit.metrics.lines import JsonlSink, Record, Sink, TrimResult, trim_jsonl
from toolkit.wording import count

log = logging.getLogger(__name__)

STREAMS = {
    "train": (
        "step", "tokens", "epoch", "time", "attempt", "loss", "ppl", "lr", "grad_norm",
        "tokens_per_second", "mfu", "data_loading_pct", "peak_memory_gb", "skipped",
    ),
    "eval": ("step", "tokens", "time", "name", "loss", "ppl"),
    "network": ("step", "time"),
    "system": ("step", "time"),
}  # fmt: skip
"""Stream -> what its lines start with, in this order. `time` is in Unix seconds."""


class MetricStreams(contextlib.AbstractContextManager["MetricStreams"]):
    """metrics/<stream>.jsonl and tb/<stream>/ of a run folder, on the main rank only.

    `resume_step`: training continues after this step. Lines of later steps, which will be written
    again, and lines torn by a crash go away; TensorBoard is told to forget the same. None: a new
    run, so whatever an attempt without a checkpoint left behind goes away.

    `tensorboard`: the streams that are written to tb/ too.

    Any thread may write.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        tensorboard: Collection[str] = tuple(STREAMS),
        resume_step: int | None = None,
        is_main: bool = True,
    ) -> None:
        self._sinks: dict[str, list[Sink]] = {s: [] for s in STREAMS}
        self._locks = {stream: threading.Lock() for stream in STREAMS}
        self._closed = False
        if not is_main:
            return
        last_step = -1 if resume_step is None else resume_step
        if tensorboard:
            (run_folder / "tb").mkdir(parents=True, exist_ok=True)
        results: dict[str, TrimResult] = {}
        for stream, sinks in self._sinks.items():
            path = run_folder / "metrics" / f"{stream}.jsonl"
            results[path.name] = trim_jsonl(path, last_step=last_step)
            sinks.append(JsonlSink(path))
            if stream in tensorboard:
                folder = run_folder / "tb" / stream
                again = folder.is_dir() and any(folder.iterdir())
                sinks.append(TensorBoardSink(folder, purge_step=last_step + 1 if again else None))
        if removed := _removed(results, resume_step):
            log.info("%s: removed %s", run_folder / "metrics", removed)

    def write(self, stream: str, records: list[Record]) -> None:
        """Append `records` (each with "step") to a stream; nothing happens on other ranks."""
        if stream not in STREAMS:
            raise ValueError(f"no such stream: {stream!r}; there are {', '.join(STREAMS)}")
        ordered = [{k: r[k] for k in STREAMS[stream] if k in r} | r for r in records]
        with self._locks[stream]:
            for sink in [] if self._closed else self._sinks[stream]:
                sink.write(ordered)

    def sync(self) -> None:
        """Bring everything written so far to disk."""
        for stream, sinks in self._sinks.items():
            with self._locks[stream]:
                for sink in sinks:
                    sink.sync()

    def close(self) -> None:
        """Sync and close all files; later writes are dropped. More than once is fine.

        Raises:
            OSError: of the first file that could not be synced; the others are closed too.
        """
        with contextlib.ExitStack() as stack:
            for stream, sinks in self._sinks.items():
                with self._locks[stream]:
                    self._closed = True
                    for sink in sinks:
                        stack.callback(sink.close)

    def __exit__(self, *_: object) -> None:
        self.close()


def _removed(results: dict[str, TrimResult], resume_step: int | None) -> str:
    """What trimming took away, by file; empty: nothing."""
    when = "of a start without a checkpoint"
    if resume_step is not None:
        when = f"after step {resume_step:,}"
    later = [f"{count(r.dropped, 'line')} of {name}" for name, r in results.items() if r.dropped]
    torn = [
        f"{count(r.damaged, 'damaged line')} of {name}" for name, r in results.items() if r.damaged
    ]
    return " and ".join([*([f"{', '.join(later)} {when}"] if later else []), *torn])
