"""Pickles that may come from elsewhere: looked through before they are read, and then read by name.

An unpickler believes what a pickle says of its own size: nine bytes can ask for gigabytes (an index
of its memo, a length of text). So the instructions are looked at first. Only the few that our files
consist of are taken, lengths must fit into the file, and empty lists and dicts, which cost memory
but no bytes, must be as rare as they are. Reading then takes about twelve times the file's size.
"""

import gc
import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

_ONE_BYTE = rb"()\]}N\x88\x89\x81Rbsuaet\x85\x86\x87\x93\x94Q"
_RUN = re.compile(rb"(?:[%s]++|[Khq].|M..|[Jj].{4}|G.{8}|\x80[\x02-\x05])*+" % _ONE_BYTE, re.DOTALL)
"""Instructions whose length is known, as many as follow one another. (Written by protocols 2 to 5;
without those that no file of ours has, such as sets, extensions and byte arrays.)"""
_LENGTHS = {0x8C: 1, 0x8A: 1, ord("U"): 1, ord("C"): 1, ord("X"): 4, 0x95: 8}
"""Instruction (text, long integer, bytes, frame) -> bytes that its length takes."""
_FRAME = 0x95
_GLOBAL, _LONG_PUT, _STOP = ord("c"), ord("r"), ord(".")
_BYTES_PER_CONTAINER = 16
_FREE_CONTAINERS = 1024


def check_pickle(raw: bytes) -> None:
    """Look through the instructions of a pickle, which is nothing but them.

    Raises:
        pickle.UnpicklingError: it would take more memory than a small multiple of its size, or is
            no pickle as we write them.
    """
    at, containers = 0, 0
    while True:
        run = _RUN.match(raw, at)
        assert run is not None, "it matches nothing too"
        # Also counts the arguments that look like them, one in a hundred.
        containers += raw.count(b"]", at, run.end()) + raw.count(b"}", at, run.end())
        at = run.end()
        if containers > _FREE_CONTAINERS + len(raw) // _BYTES_PER_CONTAINER:
            raise pickle.UnpicklingError("refused: it builds far more than its size says")
        if at >= len(raw):
            raise pickle.UnpicklingError("it is cut short")
        code, at = raw[at], at + 1
        if code == _STOP:
            return
        if code == _LONG_PUT:
            # Every entry of the memo has been an instruction before.
            if int.from_bytes(raw[at : at + 4], "little") > at:
                raise pickle.UnpicklingError("refused: it asks for more memory than its size says")
            at += 4
        elif code == _GLOBAL:
            for _ in range(2):
                at = raw.find(b"\n", at) + 1 or len(raw) + 1
        elif code in _LENGTHS:
            size = _LENGTHS[code]
            length = int.from_bytes(raw[at : at + size], "little")
            at += size
            if at + length > len(raw):
                raise pickle.UnpicklingError("refused: a length in it is larger than the file")
            if code != _FRAME:
                at += length
        else:
            raise pickle.UnpicklingError(f"refused: instruction {code:#04x} has no place in it")


def unpickle(
    raw: bytes,
    names: Mapping[tuple[str, str], Any],
    *,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of a pickle, in memory that its size bounds; nothing but `names` is called.

    Args:
        names: (module, name) -> what stands for it. Exact names: whole modules would let a file
            call functions of theirs that unpickle others.
        persistent: what a persistent id stands for.

    Raises:
        pickle.UnpicklingError: refused or damaged, or any other exception.
    """
    check_pickle(raw)
    unpickler = _Unpickler(raw, names, persistent)
    was_collecting = gc.isenabled()
    gc.disable()  # it would go through all that is there again and again: eight times the time
    try:
        return unpickler.load()
    finally:
        if was_collecting:
            gc.enable()


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        raw: bytes,
        names: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(raw))
        self._names = names
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        known = self._names.get((module, name))
        if known is None:
            raise pickle.UnpicklingError(
                f"refused: it names {module}.{name}, which no checkpoint needs"
            )
        return known

    def persistent_load(self, saved: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("refused: it names things outside it")
        return self._persistent(saved)
