"""What a run folder has recorded, as rows that trackers take: one for each step, in step order.

A row holds all streams of its step. It is complete once the train stream shows a later step, since
what belongs to a step is written before the next one; at the end all are. A record that comes after
its row (a sample of the machine, taken while the step ended) goes into the next row; after the last
row, samples of the machine wait for a longer run, and what else there is is a row of the step
that would be next.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from toolkit.runs.files import RUN_FILES

TRAIN = "train"
SAMPLES = "samples"
FILES = {
    TRAIN: RUN_FILES.train_metrics,
    "eval": RUN_FILES.eval_metrics,
    "network": RUN_FILES.network_metrics,
    "system": RUN_FILES.system_metrics,
    SAMPLES: RUN_FILES.samples,
}

NOT_FINITE = ("nan", "inf", "-inf")
_BLOCK = 1 << 22
"""Bytes that are read of one file at once."""
_MOST_WAITING = 5_000
"""Records of a stream that wait for their rows to be complete; the rest stays in the file."""
_NO_VALUES = ("step", "time", "name")


class Row(NamedTuple):
    """Everything that one step recorded."""

    step: int
    time: float
    """Unix seconds."""
    values: dict[str, float]
    """`train/loss`, `val/loss`, `network/...`, `system/...`: numbers, which may not be finite."""
    samples: list[dict[str, Any]]
    """`prompt` and `text` of each."""


class Tail:
    """The lines of a file that grows, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._decoder = msgspec.json.Decoder(dict[str, Any])
        self.is_at_end = False

    def read(self) -> list[dict[str, Any]]:
        """Some of the whole lines that were not read before; damaged ones are left out."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(_BLOCK)
        except FileNotFoundError:
            data = b""
        self.is_at_end = len(data) < _BLOCK
        end = data.rfind(b"\n") + 1
        if not end and not self.is_at_end:
            end = len(data)  # a line longer than a block is no record of ours
        self._offset += end
        records = []
        for line in data[:end].splitlines():
            try:
                record = self._decoder.decode(line)
            except (msgspec.MsgspecError, RecursionError):
                continue
            if isinstance(record.get("step"), int):
                records.append(record)
        return records


class Rows:
    """Rows that were not sent yet.

    sent: stream -> the last step of it that was sent. row: the step of the last row. Both are
    brought up to date by `take`.
    """

    def __init__(
        self, folder: Path, streams: Iterable[str], *, sent: Mapping[str, int], row: int
    ) -> None:
        self.sent, self.row = dict(sent), row
        self._streams = frozenset(streams)
        # The train stream first: what was written before one of its lines is then seen too.
        names = (TRAIN, *(s for s in FILES if s in self._streams and s != TRAIN))
        self._tails = {stream: Tail(folder / FILES[stream]) for stream in names}
        self._waiting: dict[str, deque[dict[str, Any]]] = {stream: deque() for stream in names}
        self._newest = -1

    def read(self) -> None:
        """Look for new records."""
        for stream, tail in self._tails.items():
            waiting, sent = self._waiting[stream], self.sent.get(stream, -1)
            # A row needs all records of its step, however many.
            while len(waiting) < _MOST_WAITING or waiting[0]["step"] == waiting[-1]["step"]:
                found = tail.read()
                waiting.extend(record for record in found if record["step"] > sent)
                if stream == TRAIN and found:
                    self._newest = found[-1]["step"]
                if tail.is_at_end:
                    break

    def take(self, *, is_over: bool, most: int = 200) -> list[Row]:
        """The next complete rows, up to `most`; `is_over`: nothing will be added to any."""
        last = self._last_complete(is_over=is_over)
        steps = sorted({r["step"] for w in self._waiting.values() for r in w if r["step"] <= last})
        on_time = [step for step in steps if step > self.row][:most]
        is_made_up = not on_time
        if is_made_up:
            if not is_over or not any(w for s, w in self._waiting.items() if s != "system"):
                return []
            on_time, last = [self.row + 1], max(last, self.row + 1)
        rows = {step: Row(step, 0.0, {}, []) for step in on_time}
        last = min(last, on_time[-1])
        for stream, waiting in self._waiting.items():
            while waiting and waiting[0]["step"] <= last:
                record = waiting.popleft()
                step = record["step"]
                row = rows[step if step in rows else on_time[0]]
                rows[row.step] = self._joined(row, stream, record)
                self.sent[stream] = step
        if not is_made_up:  # a longer run has that step
            self.row = on_time[-1]
        return [row for row in rows.values() if row.values or row.samples]

    def _last_complete(self, *, is_over: bool) -> int:
        """The last step to which nothing can be added."""
        behind = [
            waiting[-1]["step"] - 1
            for stream, waiting in self._waiting.items()
            if waiting and not self._tails[stream].is_at_end
        ]
        newest = max([self._newest, *(w[-1]["step"] for w in self._waiting.values() if w)])
        return min([newest if is_over else self._newest - 1, *behind])

    def _joined(self, row: Row, stream: str, record: dict[str, Any]) -> Row:
        if stream not in self._streams:
            return row
        row = row._replace(time=max(row.time, float(record.get("time") or 0.0)))
        if stream == SAMPLES:
            row.samples.append({name: str(record.get(name, "")) for name in ("prompt", "text")})
            return row
        prefix = stream if stream != "eval" else str(record.get("name", stream))
        for name, value in record.items():
            if name in _NO_VALUES or (name == "tokens" and stream != TRAIN):
                continue
            if value in NOT_FINITE:
                value = float(value)
            if isinstance(value, int | float) and not isinstance(value, bool):
                row.values[f"{prefix}/{name}"] = float(value)
        return row
