"""The four streams of metrics of a run: train, eval, network, system.

Each is a file of JSON lines and a folder of TensorBoard events.
"""

import contextlib
import functools
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np

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


MAX_EVENT_BYTES = 4 << 20
"""A file of events that is as long is followed by another one. TensorBoard reads all of a folder;
who copies them need not copy all of them again."""
_PIECE = 512
"""Bytes that one look into a table of checksums serves."""


class TensorBoardSink(Sink):
    """Writes event files that TensorBoard reads: one `Event` with all numbers of a record.

    `purge_step`: TensorBoard forgets what earlier files of the folder hold from this step on (a
    resumed run writes those steps again).
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        super().__init__(folder)
        self._purge_step = purge_step

    def write(self, records: list[Record]) -> None:
        """Append one event per record at its "step".

        "time" (Unix seconds), if there, is the event's wall time; a text "name" is the prefix of
        the tags; values that are not numbers are left out.
        """
        if not records:
            return
        if self._file is not None and self._file.tell() >= MAX_EVENT_BYTES:
            self.close()
            self._file, self._purge_step = None, None
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = []
        if self._file is None:
            now = time.time()
            self._open(now)
            events.append(Event(wall_time=now, file_version="brain.Event:2"))
            if self._purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                events.append(Event(wall_time=now, step=self._purge_step, session_log=start))
        for record in records:
            prefix = f"{record['name']}/" if isinstance(record.get("name"), str) else ""
            values = [
                Summary.Value(tag=prefix + key, simple_value=value)
                for key, value in record.items()
                if isinstance(value, int | float) and key not in ("step", "time")
            ]
            when = record.get("time") or time.time()
            summary = Summary(value=values)
            events.append(Event(step=record["step"], wall_time=when, summary=summary))
        self._append(b"".join(_framed(event.SerializeToString()) for event in events))

    def _open(self, now: float) -> None:
        self._path.mkdir(exist_ok=True)  # not its parents: a run that is gone stays so
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
        unique = len(list(self._path.glob(f"{name}.*")))
        self._file = (self._path / f"{name}.{unique}").open("xb", buffering=0)


def _framed(data: bytes) -> bytes:
    """A record of a TFRecord file: length, its checksum, data, its checksum
    (tensorflow/core/lib/io/record_writer.h)."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, masked_crc32c(length), data, masked_crc32c(data)))


def masked_crc32c(data: bytes) -> bytes:
    """CRC-32C (RFC 3720) of `data`, rotated and shifted as in tensorflow/core/lib/hash/crc32c.h.

    As `tensorboard`'s own, whose loop in Python takes 10 times as long and stops all threads
    meanwhile. The CRC is linear: the XOR of what each byte contributes by its value and its place.
    """
    (table, rows), crc = _contributions(), 0xFFFFFFFF
    for begin in range(0, len(data), _PIECE):
        piece = bytearray(data[begin : begin + _PIECE])
        head = piece[:4]
        first = int.from_bytes(head, "little") ^ crc
        piece[:4] = first.to_bytes(4, "little")[: len(head)]
        places = rows[_PIECE - len(piece) :] + np.frombuffer(piece, np.uint8)
        crc = (crc >> 8 * len(head)) ^ int(np.bitwise_xor.reduce(table[places]))
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _contributions() -> tuple[np.ndarray, np.ndarray]:
    """Of byte values (256) at each place of a piece, from the first; and where each place begins
    in this table."""
    last: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = (last >> 1) ^ (last & 1) * np.uint32(0x82F63B78)
    places = [last]
    for _ in range(_PIECE - 1):
        places.append(last[places[-1] & 0xFF] ^ (places[-1] >> 8))
    return np.concatenate(places[::-1]), np.arange(_PIECE) * 256


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
