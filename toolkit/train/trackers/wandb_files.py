"""What W&B's offline files hold: the last step, which no server can be asked for.

A file is a header of 7 bytes, then blocks of 32 KiB of framed records, as in LevelDB's log format
(github.com/google/leveldb, doc/log_format.md); a record is a protobuf `Record` of W&B.
"""

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER, _FRAME = 7, 7
_BLOCK = 1 << 15
_WHOLE, _FIRST, _LAST = 1, 2, 4


def last_step_in(folder: Path, run_id: str) -> int | None:
    """The last step that the offline files of a run in W&B's folder hold; None: it has no files.
    A process that was killed may have lost the last ones that it logged."""
    files = sorted(folder.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    if not files[:-1]:  # the newest was just begun
        return None
    return max((step for file in files for step in steps_in(file)), default=-1)


def steps_in(file: Path) -> Iterator[int]:
    """The step of each row of metrics in an offline file, up to its end or a damaged place."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for data in _records(file.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def _records(data: bytes) -> Iterator[bytes]:
    at, parts = _HEADER, b""
    while at + _FRAME <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _FRAME:  # filled with zeros
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        end = at + _FRAME + size
        if kind == 0 or end > len(data):
            return
        part, at = data[at + _FRAME : end], end
        parts = part if kind in (_WHOLE, _FIRST) else parts + part
        if kind in (_WHOLE, _LAST):
            yield parts
