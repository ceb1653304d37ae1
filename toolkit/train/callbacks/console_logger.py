"""Progress on the console: a bar on a terminal, plain lines elsewhere."""

import contextlib
import logging
import math
import time
from typing import Any

from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from toolkit.train.callbacks.base import Callback
from toolkit.train.config import ConsoleLoggerConfig

log = logging.getLogger(__name__)

REFRESH_PER_SECOND = 4
"""Of the bar; more would take the interpreter from the training thread."""


class ConsoleLogger(Callback):
    """Shows reduced records as they are delivered, on the main rank, from the metrics thread."""

    def __init__(self, config: ConsoleLoggerConfig) -> None:
        self._interval = config.interval
        self._console: Console = get_console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._seconds_per_step: float | None = None
        self._last_time: float | None = None
        self._has_told_of_nan = False
        self._has_failed = False

    def pre_train(self) -> None:
        state = self.state
        if not state.is_main:
            return
        self._last_time = time.time()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[values]}"),
                console=self._console,
                refresh_per_second=REFRESH_PER_SECOND,
                transient=True,
            )
            self._task = self._bar.add_task(
                "training", total=state.stop_step, completed=state.step, values=""
            )
            with contextlib.suppress(OSError, ValueError, SystemExit):
                self._bar.start()

    def on_metrics(self, stream: str, records: list[dict[str, Any]]) -> None:
        if not self.state.is_main or self._has_failed:
            return
        try:
            self._show(stream, records)
        except (Exception, SystemExit) as error:  # rich leaves when nobody reads its pipe
            self._has_failed = True
            log.warning("progress is no longer shown: %s: %s", type(error).__name__, error)

    def _show(self, stream: str, records: list[dict[str, Any]]) -> None:
        if stream == "eval":
            for record in records:
                self._print(_eval_line(record))
        if stream == "train":
            self._on_train(records)

    def close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError, SystemExit):
                bar.stop()

    def _on_train(self, records: list[dict[str, Any]]) -> None:
        last = records[-1]
        self._tell_of_nan(records)
        self._update_pace(records)
        if self._bar is not None and self._task is not None:
            values = self._values(last)
            self._bar.update(self._task, completed=last["step"], values=values)
            return
        for record in records:
            if record["step"] % self._interval == 0 or record["step"] == 1:
                total = self.state.stop_step
                self._print(f"step {record['step']}/{total}  {self._values(record)}")

    def _tell_of_nan(self, records: list[dict[str, Any]]) -> None:
        """Say once why a loss can be nan though nothing is wrong with the numbers."""
        for record in records:
            if not self._has_told_of_nan and math.isnan(record["loss"]) and not record["skipped"]:
                self._has_told_of_nan = True
                log.warning(
                    "step %d: its batch has no target token, so its loss is nan, and its gradient "
                    "zero; rows without targets: raise dataset.sequence_length, or leave them out",
                    record["step"],
                )

    def _update_pace(self, records: list[dict[str, Any]]) -> None:
        """Seconds per step, averaged over about the last ten deliveries."""
        now = records[-1]["time"]
        if self._last_time is not None:
            pace = (now - self._last_time) / len(records)
            known = self._seconds_per_step
            self._seconds_per_step = pace if known is None else 0.9 * known + 0.1 * pace
        self._last_time = now

    def _values(self, record: dict[str, Any]) -> str:
        parts = [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}"]
        if record.get("tokens_per_second"):
            parts.append(f"{_short(record['tokens_per_second'])} tok/s")
        if record.get("mfu") is not None:
            parts.append(f"MFU {100 * record['mfu']:.1f}%")
        if self._seconds_per_step is not None:
            left = (self.state.stop_step - record["step"]) * self._seconds_per_step
            parts.append(f"ETA {_duration(left)}")
        if record.get("skipped"):
            parts.append("SKIPPED (not finite)")
        return "  ".join(parts)

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._console.print(line, highlight=False, soft_wrap=True)
            return
        # Without a bar to move, rich would spend ten times the line's worth on laying it out.
        self._console.file.write(line + "\n")
        self._console.file.flush()


def _eval_line(record: dict[str, Any]) -> str:
    line = f"eval at step {record['step']}: {record['name']} loss {record['loss']:.4f}"
    line += f", ppl {record['ppl']:.2f}"
    if "bits_per_byte" in record:
        line += f", {record['bits_per_byte']:.4f} bits per byte"
    return line


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
