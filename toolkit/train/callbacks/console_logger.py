"""Progress on the console: a bar on a terminal, plain lines elsewhere."""

import contextlib
import logging
import math
from typing import Any

from rich import get_console
from rich.progress import BarColumn, Progress, TextColumn

from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import ConsoleLoggerConfig

log = logging.getLogger(__name__)

REFRESH_PER_SECOND = 4
"""Of the bar; more would take the interpreter from the training thread."""


class ConsoleLogger(Callback):
    """Shows reduced records as they are delivered, on the main rank, from the metrics thread."""

    def __init__(self, config: ConsoleLoggerConfig) -> None:
        self._interval = config.interval
        self._console = get_console()
        self._bar: Progress | None = None
        self._began: tuple[int, float] | None = None
        """Number and time of the first step, which compiles and tells nothing of others."""
        self._has_told_of_nan = False
        self._has_failed = False

    def pre_train(self) -> None:
        self._began = None
        if not self.state.is_main or not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
            console=self._console,
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
        )
        self._bar.add_task("", total=self.state.stop_step, completed=self.state.step)
        with contextlib.suppress(OSError, ValueError, SystemExit):
            self._bar.start()

    def on_metrics(self, stream: str, records: list[dict[str, Any]]) -> None:
        if not self.state.is_main or self._has_failed or stream not in ("train", "eval"):
            return
        try:
            if stream == "train":
                self._on_train(records)
            else:
                for record in records:
                    self._print(_eval_line(record))
        except (Exception, SystemExit) as error:  # rich leaves when nobody reads its pipe
            self._has_failed = True
            log.warning("progress is no longer shown: %s: %s", type(error).__name__, error)

    def close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError, SystemExit):
                bar.stop()

    def _on_train(self, records: list[dict[str, Any]]) -> None:
        self._tell_of_nan(records)
        if self._began is None:
            self._began = records[0]["step"], records[0]["time"]
        if self._bar is not None:
            last = records[-1]
            [task] = self._bar.task_ids
            self._bar.update(task, completed=last["step"], description=self._values(last))
            return
        for record in records:
            if record["step"] % self._interval == 0 or record["step"] == 1:
                place = f"step {record['step']}/{self.state.stop_step}"
                self._print(f"{place}  {self._values(record)}")

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

    def _values(self, record: dict[str, Any]) -> str:
        parts = [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}"]
        if record.get("tokens_per_second"):
            parts.append(f"{_short(record['tokens_per_second'])} tok/s")
        if record.get("mfu") is not None:
            parts.append(f"MFU {100 * record['mfu']:.1f}%")
        first, since = self._began or (record["step"], record["time"])
        if done := record["step"] - first:
            pace = (record["time"] - since) / done
            parts.append(f"ETA {_duration(pace * (self.state.stop_step - record['step']))}")
        if record.get("skipped"):
            is_finite = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
            parts.append(f"SKIPPED ({'spike' if is_finite else 'not finite'})")
        return "  ".join(parts)

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._console.print(line, highlight=False, soft_wrap=True)
            return
        # Without a bar to move, rich would spend ten times the line's worth on laying it out.
        self._console.file.write(line + "\n")
        self._console.file.flush()


def _eval_line(record: dict[str, Any]) -> str:
    line = f"eval at step {record['step']}: {record['name']} "
    if not {"loss", "ppl"} <= record.keys():  # an evaluation of the user's own
        rest = {
            k: v
            for k, v in record.items()
            if k not in ("step", "tokens", "time", "name", "seconds")
        }
        numbers = (f"{k} {v:.4f}" for k, v in rest.items() if isinstance(v, float))
        return line + ", ".join(numbers)
    line += f"loss {record['loss']:.4f}, ppl {record['ppl']:.2f}"
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
