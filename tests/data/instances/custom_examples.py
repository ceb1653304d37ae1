"""Data sets as users write them; imported by name, in worker processes too."""

import os
from collections.abc import Iterator
from typing import ClassVar

import numpy as np


class Counting:
    """Item i is the ids from i on."""

    vocab_size = 1000

    def __init__(self, sequence_length: int, split: str = "train", count: int = 40) -> None:
        self.count = count if split == "train" else 5
        self.length = sequence_length
        self.fingerprint = f"counting {count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return np.arange(index, index + self.length)


class Short:
    """Items of several lengths, with a mask."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = np.arange(index + 1)
        return {"input_ids": ids, "label_mask": ids > 0}


class Lines:
    """Iterable-style: ten items a pass."""

    def __init__(self, sequence_length: int) -> None:
        self.length = sequence_length

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(10):
            yield np.full(self.length, number)


class Skipping(Lines):
    """Iterable-style, and quick to start anywhere."""

    starts: ClassVar[list[int]] = []

    def iterate(self, start: int) -> Iterator[np.ndarray]:
        Skipping.starts.append(start)
        while True:
            yield np.full(self.length, start % 10)
            start += 1


class Bad:
    def __init__(self, what: str = "raises") -> None:
        self.what = what

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> object:
        if index != 3:
            return [1, 2, 3]
        if self.what == "dies":
            os._exit(1)
        if self.what == "raises":
            raise KeyError("text")
        return {
            "long": list(range(99)),
            "floats": [0.5, 1.0],
            "key": {"input_ids": [1], "labels": [1]},
            "shapes": {"input_ids": [1, 2], "label_mask": [True]},
            "nothing": {},
            "ragged": [[1], [2, 3]],
            "words": {"input_ids": [1], "document_ids": ["a"]},
            "huge": np.array([2**63], dtype=np.uint64),
        }[self.what]


class BadLines:
    """Iterable-style, and fails after two items in the way asked for."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __iter__(self) -> Iterator[list[int]]:
        yield [1]
        yield [1]
        if self.what == "raises":
            raise ValueError("no more memory")
        if self.what == "stops":
            next(iter(()))


class Ending(BadLines):
    """`iterate` should go on for ever."""

    def iterate(self, start: int) -> Iterator[list[int]]:
        for number in range(start, 3):
            yield [number]


class Unmeasurable(Counting):
    def __len__(self) -> int:
        raise OSError("index is gone")


class ProcessIds(Counting):
    """Items are the number of the process that makes them."""

    vocab_size = 1 << 31

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full(self.length, os.getpid())


class Nothing(Lines):
    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(())


class Made(Counting):
    """Remembers the splits it was made for."""

    splits: ClassVar[list[str]] = []

    def __init__(self, sequence_length: int, split: str = "train", count: int = 40) -> None:
        Made.splits.append(split)
        super().__init__(sequence_length, split, count)


class MadeLines(Lines):
    made: ClassVar[list[int]] = []

    def __init__(self, sequence_length: int) -> None:
        MadeLines.made.append(1)
        super().__init__(sequence_length)


class Reads(Counting):
    """Remembers the items asked for."""

    items: ClassVar[list[int]] = []

    def __getitem__(self, index: int) -> np.ndarray:
        Reads.items.append(index)
        return super().__getitem__(index)


class ReadLines:
    """Iterable-style with a length; remembers how many items it gave."""

    given: ClassVar[list[int]] = []

    def __init__(self, sequence_length: int, split: str = "train", count: int = 37) -> None:
        self.length, self.count = sequence_length, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(self.count):
            ReadLines.given.append(number)
            yield np.full(self.length, number)


NO_CLASS = 3


class Neither:
    pass
