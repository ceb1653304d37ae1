"""The weights of a folder in Hugging Face format, one tensor at a time.

Two formats: safetensors (8 bytes little-endian length, a JSON header, the bytes;
https://huggingface.co/docs/safetensors) and what `torch.save` writes (a zip file without
compression; before torch 1.6 a sequence of pickles, which tells no offsets). Headers alone tell
where each tensor lies.

Each tensor is a mapping of its own range of the file: nothing is copied, and with the tensor its
pages go too, so memory stays at the tensors that the caller keeps. A mapping of whole files would
count all that was ever read.
"""

import json
import math
import mmap
import re
import warnings
import zipfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from toolkit.checkpoint.tensors import read_into
from toolkit.errors import CheckpointError
from toolkit.storage.foreign import check_regular, guard, read_bytes, reason_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names of types in headers."""
_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""In order of preference."""
_LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _HeaderEntry(msgspec.Struct):
    """One tensor in the header of a safetensors file."""

    dtype: str
    shape: list[_Count]
    data_offsets: tuple[_Count, _Count]


class StoredTensor(NamedTuple):
    """One tensor of a weight file."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype | None
    """None: a type that torch has no name for."""
    dtype_name: str
    """For messages."""
    offset: int | None
    """Of its first byte in the file; None: the file has to be loaded as a whole."""
    stride: tuple[int, ...] | None = None
    """None: row by row without gaps."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.shape.numel() * (self.dtype.itemsize if self.dtype else 0)


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a safetensors file, whose byte ranges are checked against its size.

    Raises:
        CheckpointError: the header is damaged, or the file is longer or shorter than it says.
    """
    damaged = f"{path}: damaged safetensors header"
    size = check_regular(path, CheckpointError)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(
                f"{path}: {size} bytes are too few for its header, or it is no safetensors file; "
                "get it again"
            )
        text = file.read(length)
    with guard(damaged, CheckpointError):
        header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = [
            (name, msgspec.json.decode(entry, type=_HeaderEntry)) for name, entry in header.items()
        ]
    tensors = {}
    position = 0
    for name, entry in sorted(entries, key=lambda pair: pair[1].data_offsets):
        begin, end = entry.data_offsets
        dtype = DTYPES.get(entry.dtype)
        expected = math.prod(entry.shape) * dtype.itemsize if dtype else end - begin
        if begin != position or end - begin != expected:
            raise CheckpointError(
                f"{damaged}: {name} {entry.dtype} {tuple(entry.shape)} at bytes {begin} to {end}, "
                f"where {position} to {position + expected} were expected"
            )
        with guard(damaged, CheckpointError):  # dimensions that torch cannot count
            shape = torch.Size(entry.shape)
        tensors[name] = StoredTensor(path, shape, dtype, entry.dtype, 8 + length + begin)
        position = end
    if 8 + length + position != size:
        state = "truncated" if size < 8 + length + position else "longer than its header says"
        raise CheckpointError(
            f"{path}: {state}: {size} bytes, where the header tells of {8 + length + position}; "
            "get it again"
        )
    return tensors


def read_torch_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a state dict by `torch.save`; no code of the file is run.

    Raises:
        CheckpointError: the file is damaged, or holds more than tensors.
    """
    tensors = {}
    for name, tensor in load_torch_file(path, device="meta").items():
        storage: Any = tensor.untyped_storage()
        begin = getattr(storage, "_checkpoint_offset", None)
        if begin is not None:
            begin += tensor.storage_offset() * tensor.element_size()
        tensors[name] = StoredTensor(
            file=path,
            shape=tensor.shape,
            dtype=tensor.dtype,
            dtype_name=str(tensor.dtype).removeprefix("torch."),
            offset=begin,
            stride=None if tensor.is_contiguous() else tensor.stride(),
        )
    return tensors


def load_torch_file(path: Path, *, device: str) -> dict[str, torch.Tensor]:
    """A state dict by `torch.save`, as a whole; raises CheckpointError."""
    check_regular(path, CheckpointError)
    _check_not_compressed(path)
    try:
        with warnings.catch_warnings():
            # About the pickle protocol of what is refused right after.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        reason = _why_refused(error).split(". ")[0]
        raise CheckpointError(f"{path}: cannot be read: {reason}; get it again") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor; a file of weights "
                "holds tensors by name and nothing else"
            )
        if value.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is a tensor of layout {str(value.layout).removeprefix('torch.')}; "
                "weights must be stored dense"
            )
    return loaded


def _check_not_compressed(path: Path) -> None:
    """Raise CheckpointError for a zip file that torch did not write: it never compresses, so what a
    record takes in memory is what it takes on disk."""
    with guard(path, CheckpointError, "get it again"):
        if not zipfile.is_zipfile(path):
            return
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
                raise CheckpointError(
                    f"{path}: its record {record.filename!r} is compressed, which torch.save never "
                    "does; it is refused, because it could fill the memory"
                )
        if sum(record.file_size for record in records) > size:
            raise CheckpointError(f"{path}: its records overlap; get it again")


def _why_refused(error: Exception) -> str:
    """In one line, without torch's advice to trust the file."""
    text = str(error).strip()
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"refused: it names {named[1]}, which no checkpoint needs"
    if text.startswith("Weights only load failed"):
        return "refused: it holds more than tensors and plain values, or is damaged"
    return reason_of(error)


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
