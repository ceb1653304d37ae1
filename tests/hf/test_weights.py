"""Weight files of Hugging Face folders: what is read, and what is refused."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.errors import CheckpointError
from toolkit.hf.weights import HFWeights

TENSORS = {
    "a": torch.arange(24.0).reshape(4, 6),
    "b": torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c": torch.arange(6).half(),
}


def write_sharded(folder: Path, ending: str = "safetensors", **changes: str) -> Path:
    """Two files and their index; `changes` are made to the index."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{n}-of-00002.{ending}" for n in (1, 2)]
    for file, names in zip(files, ("ab", "c"), strict=True):
        part = {name: TENSORS[name] for name in names}
        save: Any = save_file if ending == "safetensors" else torch.save
        save(part, folder / file)
    places = {"a": files[0], "b": files[0], "c": files[1]} | changes
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": {k: v for k, v in places.items() if v}}))
    return index


def assert_reads_all(folder: Path) -> None:
    weights = HFWeights(folder)
    assert set(weights.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.read(name), tensor)
        assert weights.read(name).dtype == tensor.dtype == weights.tensors[name].dtype


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_sharded_files_are_read_by_their_index(tmp_path: Path, ending: str) -> None:
    write_sharded(tmp_path, ending)
    assert_reads_all(tmp_path)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_files_are_read_in_both_formats(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=new_format)
    assert_reads_all(tmp_path)


def test_strided_tensors_of_pickled_files_come_out_in_order(tmp_path: Path) -> None:
    a = TENSORS["a"]
    torch.save({"t": a.t(), "part": a[1:3], "columns": a[:, ::2]}, tmp_path / "pytorch_model.bin")
    weights = HFWeights(tmp_path)
    for name, expected in (("t", a.t()), ("part", a[1:3]), ("columns", a[:, ::2])):
        read = weights.read(name)
        assert torch.equal(read, expected)
        assert read.is_contiguous()


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_reads_all(tmp_path)


def test_changing_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    HFWeights(tmp_path).read("a").fill_(7.0)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], TENSORS["a"])


def test_equality_is_of_bits(tmp_path: Path) -> None:
    a = torch.zeros(1000)
    tensors = {"a": a, "same": a.clone(), "negative": -a, "short": a[:10].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = HFWeights(tmp_path)
    assert weights.is_equal("a", "same")
    assert not weights.is_equal("a", "negative")
    assert not weights.is_equal("a", "short")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": "model-00001-of-00002.safetensors"}, "d should be in .*, but no file has it"),
        ({"b": "model-00002-of-00002.safetensors"}, "b should be in .*-00001-of-00002.* has it"),
        ({"b": ""}, "does not list b of model-00001"),
        ({"c": ""}, "does not list model-00002-of-00002.safetensors, which lies beside it"),
        ({"c": "model-00003-of-00002.safetensors"}, "does not list model-00002"),
        ({"c": "../x.safetensors"}, "names a file outside its folder"),
    ],
)
def test_an_index_that_disagrees_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    write_sharded(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        HFWeights(tmp_path)


def test_missing_and_doubled_shards_are_refused(tmp_path: Path) -> None:
    index = write_sharded(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, second)
    with pytest.raises(CheckpointError, match=r"00002.safetensors: holds a, and so does model-000"):
        HFWeights(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"missing, though model.safetensors.index.json"):
        HFWeights(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"index.json: missing, though there is model-00001"):
        HFWeights(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        HFWeights(tmp_path / "gone")


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path).write_text("{")
    with pytest.raises(CheckpointError, match=r"index.json: cannot be read: JSONDecodeError"):
        HFWeights(tmp_path)


_DAMAGED = "cannot be read: Error while deserializing header: "
_AGAIN = r"[^\n]*; get it again\Z"


def damage(path: Path, kind: str) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = raw[8 : 8 + length], raw[8 + length :]
    if kind == "body":
        path.write_bytes(raw[:-5])
    elif kind == "longer":
        path.write_bytes(raw + b"12345")
    elif kind == "in header":
        path.write_bytes(raw[:40])
    elif kind == "in length":
        path.write_bytes(raw[:5])
    elif kind == "no json":
        path.write_bytes(raw[:8] + b"[" + header[1:] + body)
    else:
        changed = header.replace(b"[4,6]", b"[6,6]")
        path.write_bytes(raw[:8] + changed + body)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("body", "incomplete metadata, file not fully covered"),
        ("longer", "incomplete metadata, file not fully covered"),
        ("in header", "invalid header length"),
        ("in length", "header too small"),
        ("no json", "invalid JSON in header"),
        ("shape", "invalid shape, data type, or offset for tensor"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    damage(tmp_path / "model.safetensors", kind)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {_DAMAGED}{message}{_AGAIN}"):
        HFWeights(tmp_path)


def test_damaged_and_foreign_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for content, message in (
        ({"a": Path("x")}, "refused: it names pathlib"),
        ({"a": torch.ones(1), "step": 3}, "'step' is a int, not a tensor"),
        ([torch.ones(1)], "holds a list, not tensors by name"),
        ({"a": torch.ones(3).to_sparse()}, "a is a tensor of layout sparse_coo; .* stored dense"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            HFWeights(tmp_path)
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"bin: cannot be read: \S[^.]*; get it again$"):
        HFWeights(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    weights = HFWeights(tmp_path)
    path.write_bytes(path.read_bytes()[:120])
    with pytest.raises(CheckpointError, match=rf"{_DAMAGED}.*{_AGAIN}"):
        weights.read("a")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]},
        {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "X1", "shape": [2**63], "data_offsets": [0, 8]},
        [],
        None,
    ],
)
def test_headers_of_other_types_and_sizes_are_one_line(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {_DAMAGED}.*{_AGAIN}"):
        HFWeights(tmp_path)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    place = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": place, "b": place}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(
        CheckpointError, match=rf"{_DAMAGED}invalid offset for tensor `[ab]`{_AGAIN}"
    ):
        HFWeights(tmp_path)


def test_a_torch_file_with_compressed_records_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.bin")
    with (
        zipfile.ZipFile(tmp_path / "whole.bin") as whole,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in whole.infolist():
            packed.writestr(record.filename, whole.read(record))
    with pytest.raises(CheckpointError, match=r"refused: its record .* is compressed"):
        HFWeights(tmp_path)
