"""The four streams of metrics of a run: train, eval, network, system."""

import contextlib
import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from toolkit.metrics.repair import TrimResult, trim_jsonl
from toolkit.metrics.sinks import JsonlSink, TensorBoardSink
from toolkit.wording import count

log = logging.getLogger(__name__)

STREAMS = ("train", "eval", "network", "system")
TRAIN_FIELDS = (
    "step", "tokens", "epoch", "time", "attempt", "loss", "ppl", "lr", "grad_norm",
    "tokens_per_second", "mfu", "data_loading_pct", "peak_memory_gb", "skipped",
)  # fmt: skip
"""What a line of train.jsonl starts with, in this order. `time` is in Unix seconds."""
EVAL_FIELDS = ("step", "tokens", "time", "name", "loss", "ppl")
"""What a line of eval.jsonl starts with."""
_FIELDS = {"train": TRAIN_FIELDS, "eval": EVAL_FIELDS}


class MetricStreams:
    """metrics/<stream>.jsonl and tb/<stream>/ of a run folder, on the main rank only.

    `resume_step`: training continues after this step. Lines of later steps, which will be written
    again, and lines torn by a crash go away; TensorBoard is told to forget the same. None: a new
    run, so whatever an attempt without a checkpoint left behind goes away.

    Any thread may write.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
        is_main: bool = True,
    ) -> None:
        self._jsonl: dict[str, JsonlSink] = {}
        self._tensorboard: dict[str, TensorBoardSink] = {}
        self._locks = {stream: threading.Lock() for stream in STREAMS}
        self._closed = False
        if not is_main:
            return
        last_step = -1 if resume_step is None else resume_step
        if tensorboard:
            (run_folder / "tb").mkdir(parents=True, exist_ok=True)
        results: dict[str, TrimResult] = {}
        for stream in STREAMS:
            path = run_folder / "metrics" / f"{stream}.jsonl"
            result = trim_jsonl(path, last_step=last_step)
            results[f"{stream}.jsonl"] = result
            self._jsonl[stream] = JsonlSink(path)
            if tensorboard:
                folder = run_folder / "tb" / stream
                again = folder.is_dir() and any(folder.iterdir())
                self._tensorboard[stream] = TensorBoardSink(
                    folder, purge_step=last_step + 1 if again else None
                )
        if removed := _removed(results, resume_step):
            log.info("%s: removed %s", run_folder / "metrics", removed)

    def write(self, stream: str, records: list[dict[str, Any]]) -> None:
        """Append `records` (each with "step") to a stream; nothing happens on other ranks."""
        if stream not in self._jsonl:
            if stream not in STREAMS:
                raise ValueError(f"no such stream: {stream!r}; there are {', '.join(STREAMS)}")
            return
        fields = _FIELDS.get(stream, ("step", "time"))
        ordered = [{k: r[k] for k in fields if k in r} | r for r in records]
        with self._locks[stream]:
            if self._closed:
                return
            for sink in self._sinks(stream):
                sink.write(ordered)

    def sync(self) -> None:
        """Bring everything written so far to disk."""
        for stream in STREAMS:
            with self._locks[stream]:
                for sink in self._sinks(stream):
                    sink.sync()

    def close(self) -> None:
        """Sync and close all files; later writes are dropped. More than once is fine.

        Raises:
            OSError: of the first file that could not be synced; the others are closed too.
        """
        with contextlib.ExitStack() as stack:
            for stream in STREAMS:
                with self._locks[stream]:
                    self._closed = True
                    for sink in self._sinks(stream):
                        stack.callback(sink.close)

    def _sinks(self, stream: str) -> list[JsonlSink | TensorBoardSink]:
        both = (self._jsonl.get(stream), self._tensorboard.get(stream))
        return [sink for sink in both if sink is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
