"""The weights of a folder in Hugging Face format, one tensor at a time.

Each tensor is a mapping of its own range of the file: nothing is copied, and with the tensor its
pages go too, so memory stays at the tensors that the caller keeps. A mapping of whole files would
count all that was ever read.
"""

import json
import mmap
import re
from pathlib import Path

import torch
from torch import Tensor

from toolkit.checkpoint.ranges import read_into
from toolkit.errors import CheckpointError
from toolkit.hf.stored import (
    StoredTensor,
    load_torch_file,
    read_safetensors_header,
    read_torch_header,
)
from toolkit.storage.foreign import guard, read_bytes

_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""In order of preference."""


class HFWeights:
    """All tensors of `model.safetensors`, `model-0000x-of-0000y.safetensors` with their index, or
    the same of `pytorch_model` and `.bin`; safetensors where there are both.

    Every header is read, and checked against its file and the index, when this is made.

    Raises:
        CheckpointError: no weights there, a damaged or truncated file, or an index and files that
            disagree.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.files, index = _find_files(self.folder)
        """In the order of their names."""
        self.tensors: dict[str, StoredTensor] = {}
        """In the order in which they lie in the files."""
        for file in self.files:
            is_safe = file.suffix == ".safetensors"
            tensors = read_safetensors_header(file) if is_safe else read_torch_header(file)
            for name, tensor in tensors.items():
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{file}: holds {name}, and so does {other}")
                self.tensors[name] = tensor
        if index is not None:
            self._check_index(*index)
        self._loaded: tuple[Path, dict[str, Tensor]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A tensor in its own type, in `out` or memory of its own: changes do not reach the file.

        Args:
            out: contiguous CPU tensor of the same shape and type.

        Raises:
            CheckpointError: the file has become shorter.
        """
        stored = self.tensors[name]
        if stored.dtype is None:
            raise CheckpointError(
                f"{stored.file}: {name} is of the unknown type {stored.dtype_name}"
            )
        if stored.offset is None:
            source = self._load_file(stored.file)[name]
            return source.clone() if out is None else out.copy_(source)
        if stored.stride is not None:
            source = self._read_strided(name, stored, stored.stride)
            return source if out is None else out.copy_(source)
        if out is None and stored.nbytes and stored.offset % stored.dtype.itemsize == 0:
            return _mapped(stored.file, stored.offset, stored.nbytes, stored.dtype, stored.shape)
        target = torch.empty(stored.shape, dtype=stored.dtype) if out is None else out
        self._fill(name, target, stored.file, stored.offset)
        return target

    def is_equal(self, one: str, other: str, *, piece_bytes: int = 16 << 20) -> bool:
        """Whether two tensors have the same type, shape and bits; compares piece by piece."""
        first, second = self.tensors[one], self.tensors[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        plain = all(t.offset is not None and t.stride is None for t in (first, second))
        if not plain:
            pair = [self.read(name).reshape(-1).view(torch.uint8) for name in (one, other)]
            return torch.equal(*pair)
        for begin in range(0, first.nbytes, piece_bytes):
            size = min(piece_bytes, first.nbytes - begin)
            pieces = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
            for name, stored, piece in zip((one, other), (first, second), pieces, strict=True):
                self._fill(name, piece, stored.file, (stored.offset or 0) + begin)
            if not torch.equal(*pieces):
                return False
        return True

    def _fill(self, name: str, target: Tensor, file: Path, offset: int) -> None:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            read_into(stream, target, f"{file}: {name}")

    def _read_strided(self, name: str, stored: StoredTensor, stride: tuple[int, ...]) -> Tensor:
        steps = zip(stored.shape, stride, strict=True)
        count = 1 + sum((n - 1) * step for n, step in steps) if stored.shape.numel() else 0
        flat = torch.empty(count, dtype=stored.dtype)
        self._fill(name, flat, stored.file, stored.offset or 0)
        return flat.as_strided(stored.shape, stride).contiguous()

    def _load_file(self, file: Path) -> dict[str, Tensor]:
        """A file of the old format of `torch.save`; the last one is kept."""
        if self._loaded is None or self._loaded[0] != file:
            self._loaded = None
            self._loaded = (file, load_torch_file(file, device="cpu"))
        return self._loaded[1]

    def _check_index(self, path: Path, places: dict[str, str]) -> None:
        for name, file in places.items():
            stored = self.tensors.get(name)
            if stored is None or stored.file.name != file:
                held = f"{stored.file.name} has it" if stored else "no file has it"
                raise CheckpointError(f"{path}: {name} should be in {file}, but {held}")
        unlisted = [name for name in self.tensors if name not in places]
        if unlisted:
            raise CheckpointError(
                f"{path}: does not list {unlisted[0]} of {self.tensors[unlisted[0]].file.name}"
                f"{_and_more(len(unlisted) - 1)}"
            )


def _mapped(file: Path, offset: int, nbytes: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as stream:
        try:
            memory = mmap.mmap(
                stream.fileno(), offset - begin + nbytes, access=mmap.ACCESS_COPY, offset=begin
            )
        except ValueError:
            raise CheckpointError(f"{file}: has become shorter while it was read") from None
    # The system starts reading it now.
    memory.madvise(mmap.MADV_WILLNEED)
    count = nbytes // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset - begin).view(shape)


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def _find_files(folder: Path) -> tuple[list[Path], tuple[Path, dict[str, str]] | None]:
    """The weight files, and the path and content of their index."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    for stem, ending in _FORMATS:
        single = folder / f"{stem}.{ending}"
        if single.is_file():
            return [single], None
        index = folder / f"{stem}.{ending}.index.json"
        shards = re.compile(rf"{stem}-\d+-of-\d+\.{ending}")
        present = {path.name for path in folder.iterdir() if shards.fullmatch(path.name)}
        if index.is_file():
            places = _read_index(index)
            files = sorted(set(places.values()))
            if extra := sorted(present - set(files)):
                raise CheckpointError(
                    f"{index}: does not list {extra[0]}, which lies beside it"
                    f"{_and_more(len(extra) - 1)}; remove what is not of this model"
                )
            if missing := [name for name in files if not (folder / name).is_file()]:
                raise CheckpointError(
                    f"{folder / missing[0]}: missing, though {index.name} lists it"
                    f"{_and_more(len(missing) - 1)}; get the folder again"
                )
            return [folder / name for name in files], (index, places)
        if present:
            raise CheckpointError(f"{index}: missing, though there is {sorted(present)[0]}")
    raise CheckpointError(
        f"{folder}: holds no weights; model.safetensors, model.safetensors.index.json with its "
        "files, or the same of pytorch_model and .bin were expected"
    )


def _read_index(path: Path) -> dict[str, str]:
    data = read_bytes(path, CheckpointError)
    with guard(path, CheckpointError, "get it again"):
        places = json.loads(data)["weight_map"]
        named = {str(name): str(file) for name, file in places.items()}
    for file in named.values():
        if Path(file).name != file:
            raise CheckpointError(f"{path}: names a file outside its folder: {file!r}")
    return named
