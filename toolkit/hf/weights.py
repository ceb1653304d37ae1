"""The weights of a folder in Hugging Face format, one tensor at a time.

Two formats: safetensors, and what `torch.save` writes. Each tensor is a mapping of a file that is
opened for it alone: nothing is copied, and with the tensor its pages go too, so memory stays at the
tensors that the caller keeps. Only files from before torch 1.6 have to be loaded as a whole.
"""

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from toolkit.checkpoint.untrusted import Archive
from toolkit.errors import CheckpointError
from toolkit.storage.foreign import check_regular, guard, read_bytes, reason_of

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights that fp32 master weights hold exactly, by their names in safetensors."""

_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""In order of preference."""
_AGAIN = "get it again"


class StoredTensor(NamedTuple):
    file: Path
    shape: torch.Size
    type_name: str
    """For messages."""
    dtype: torch.dtype | None
    """None: none of `FLOATS`."""


class HFWeights:
    """All tensors of `model.safetensors`, `model-0000x-of-0000y.safetensors` with their index, or
    the same of `pytorch_model` and `.bin`; safetensors where there are both.

    Every header is read, and checked against its file and the index, when this is made. Raises
    CheckpointError: no weights there, a damaged or truncated file, or an index and files that
    disagree."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        files, index = _find_files(self.folder)
        self.tensors: dict[str, StoredTensor] = {}
        """In the order in which they lie in the files."""
        self._loaded: tuple[Path, dict[str, Tensor]] | None = None
        for file in files:
            is_safe = file.suffix == ".safetensors"
            for name, tensor in (_safetensors(file) if is_safe else self._torch_file(file)).items():
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{file}: holds {name}, and so does {other}")
                self.tensors[name] = tensor
        if index is not None:
            self._check_index(*index)

    def read(self, name: str) -> Tensor:
        """A tensor in its own type; changes do not reach the file. Raises CheckpointError: the file
        is not what it was."""
        file = self.tensors[name].file
        if file.suffix != ".safetensors":
            return self._load(file)[name].contiguous()
        with guard(file, CheckpointError, _AGAIN), safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    def is_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same type, shape and bits."""
        first, second = self.read(one), self.read(other)
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (first, second)))

    def _torch_file(self, file: Path) -> dict[str, StoredTensor]:
        return {
            name: StoredTensor(
                file,
                tensor.shape,
                str(tensor.dtype).removeprefix("torch."),
                tensor.dtype if tensor.dtype in FLOATS.values() else None,
            )
            for name, tensor in self._load(file).items()
        }

    def _load(self, file: Path) -> dict[str, Tensor]:
        """A file of `torch.save`, mapped; of the old format, the last one read is kept."""
        if self._loaded is not None and self._loaded[0] == file:
            return self._loaded[1]
        self._loaded = None
        check_regular(file, CheckpointError)
        with guard(file, CheckpointError, _AGAIN):
            if is_mapped := zipfile.is_zipfile(file):
                # torch would unpack a compressed record, however large it gets.
                with file.open("rb") as stream:
                    Archive(stream, file.stat().st_size)
        loaded = _load_torch_file(file, is_mapped=is_mapped)
        if not is_mapped:
            self._loaded = file, loaded
        return loaded

    def _check_index(self, path: Path, places: dict[str, str]) -> None:
        for name, file in places.items():
            stored = self.tensors.get(name)
            if stored is None or stored.file.name != file:
                held = f"{stored.file.name} has it" if stored else "no file has it"
                raise CheckpointError(f"{path}: {name} should be in {file}, but {held}")
        unlisted = [f"{n} of {t.file.name}" for n, t in self.tensors.items() if n not in places]
        if unlisted:
            raise CheckpointError(f"{path}: does not list {_first(unlisted)}")


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    """From its header, which the library checks against the size of the file."""
    check_regular(file, CheckpointError)
    tensors = {}
    with guard(file, CheckpointError, _AGAIN), safe_open(file, "pt") as opened:
        for name in opened.offset_keys():
            entry = opened.get_slice(name)
            type_name, shape = entry.get_dtype(), torch.Size(entry.get_shape())
            tensors[name] = StoredTensor(file, shape, type_name, FLOATS.get(type_name))
    return tensors


def _load_torch_file(file: Path, *, is_mapped: bool) -> dict[str, Tensor]:
    """A state dict; no code of the file is run. Raises CheckpointError where it holds more."""
    try:
        with warnings.catch_warnings():
            # About the pickle protocol of what is refused right after.
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # damaged files raise nearly anything
        reason = _why_refused(error).split(". ")[0]
        raise CheckpointError(f"{file}: cannot be read: {reason}; {_AGAIN}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file}: holds a {type(loaded).__name__}, not tensors by name")
    for name, value in loaded.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise CheckpointError(
                f"{file}: {name!r} is a {type(value).__name__}, not a tensor; a file of weights "
                "holds tensors by name and nothing else"
            )
        if value.layout != torch.strided:
            raise CheckpointError(
                f"{file}: {name} is a tensor of layout {str(value.layout).removeprefix('torch.')}; "
                "weights must be stored dense"
            )
    return loaded


def _why_refused(error: Exception) -> str:
    """In one line, without torch's advice to trust the file."""
    text = str(error).strip()
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"refused: it names {named[1]}, which no checkpoint needs"
    if text.startswith("Weights only load failed"):
        return "refused: it holds more than tensors and plain values, or is damaged"
    return reason_of(error)


def _first(names: list[str], more: str = "") -> str:
    """The first of `names`, what is said of it, and how many more there are."""
    return f"{names[0]}{more}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


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
                listed = _first(extra, ", which lies beside it")
                raise CheckpointError(
                    f"{index}: does not list {listed}; remove what is not of this model"
                )
            if missing := [name for name in files if not (folder / name).is_file()]:
                listed = _first(missing, f": missing, though {index.name} lists it")
                raise CheckpointError(f"{folder}/{listed}; get the folder again")
            return [folder / name for name in files], (index, places)
        if present:
            raise CheckpointError(f"{index}: missing, though there is {min(present)}")
    raise CheckpointError(
        f"{folder}: holds no weights; model.safetensors, model.safetensors.index.json with its "
        "files, or the same of pytorch_model and .bin were expected"
    )


def _read_index(path: Path) -> dict[str, str]:
    data = read_bytes(path, CheckpointError)
    with guard(path, CheckpointError, _AGAIN):
        places = json.loads(data)["weight_map"]
        named = {str(name): str(file) for name, file in places.items()}
    for file in named.values():
        if Path(file).name != file:
            raise CheckpointError(f"{path}: names a file outside its folder: {file!r}")
    return named
