"""Checkpoints of tables of shards, made by cutting known tensors: any layout loads what any saves.

No model runs here: what a rank of a layout holds is cut out of the whole by hand, in the forms that
engines have it in: plain tensors, DTensors of FSDP2, and parts of parameters that FSDP2 shards
further. Names differ between stages of a pipeline, but for the tied embeddings, which two have.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.checkpoint.exchange import differences
from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit.checkpoint.commit import Save, save_checkpoint, write_checkpoint
from toolkit.checkpoint.folder import check_files, read_metadata
from toolkit.checkpoint.load import load_checkpoint
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.distributed.layout import AXES, Layout
from toolkit.distributed.shards import LocalShard, ShardSpec, local_tensor, stored_tensor
from toolkit.errors import CheckpointError

LAYERS = 2
SHAPES = {
    "embeddings.tokens.weight": (12, 5),
    **{
        f"blocks.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            "attention.query.weight": (8, 5),
            "attention.key.weight": (4, 5),
            "attention.output.weight": (5, 8),
            "norm.weight": (5,),
            "router.weight": (4, 5),
            "experts.gate": (4, 6, 5),
            "experts.down": (4, 5, 6),
        }.items()
    },
    "head.norm.weight": (5,),
}
TP_DIMENSIONS = {"tokens": 0, "query": 0, "key": 0, "output": 1, "gate": 1, "down": 2}
KV_HEADS = 1
"""Fewer than tp ranks, each of which has all of `key`."""

LAYOUTS = {
    "single": Layout(),
    "cp under ddp": Layout(cp=2),
    "fsdp": Layout(dp_shard=4, is_fsdp=True),
    "fsdp x tp": Layout(dp_shard=2, tp=2, is_fsdp=True),
    "hsdp x ep": Layout(dp_replicate=2, dp_shard=2, ep=2, is_fsdp=True),
    "ep x efsdp": Layout(dp_shard=4, ep=2, is_fsdp=True),
    "tp x ep": Layout(dp_shard=2, tp=2, ep=4, is_fsdp=True),
    "pp x tp": Layout(pp=2, tp=2, is_fsdp=True),
    "pp x cp": Layout(pp=2, cp=2, is_fsdp=True),
}


def whole_state() -> dict[str, torch.Tensor]:
    """Weights, moments and counts, all of different numbers."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in SHAPES.items():
        state[f"model.{name}"] = torch.randn(shape, generator=generator)
        state[f"optim.{name}.exp_avg"] = torch.randn(shape, generator=generator)
        state[f"optim.{name}.step"] = torch.randn((), generator=generator)
    return state


def stages_of(name: str, layout: Layout) -> set[int]:
    if "embeddings" in name:
        return {0, layout.pp - 1}
    if "head" in name:
        return {layout.pp - 1}
    return {int(name.split(".")[1]) * layout.pp // LAYERS}


def spec_of(name: str, layout: Layout, rank: int) -> ShardSpec:
    spec, place = ShardSpec(torch.Size(SHAPES[name])), layout.place(rank)
    is_of_experts, kind = "experts" in name, name.split(".")[-2 if "weight" in name else -1]
    if is_of_experts and layout.ep > 1:
        number = SHAPES[name][0] // layout.ep
        start = layout.place(rank, experts=True)["ep"] * number
        return spec._replace(dim=0, start=start, length=number)
    if layout.tp == 1 or kind not in TP_DIMENSIONS:
        return spec
    dim = TP_DIMENSIONS[kind]
    if kind == "key":
        return spec._replace(dim=dim, start=0, length=SHAPES[name][dim], copies=layout.tp)
    length = SHAPES[name][dim] // layout.tp
    return spec._replace(dim=dim, start=place["tp"] * length, length=length)


def held(layout: Layout, rank: int, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `rank` holds of `whole`, as its engine's `state_tensors` would be."""
    meshes: dict[str, Any] = {}
    if layout.is_fsdp and layout.world_size > 1:
        mesh = init_device_mesh("cpu", tuple(layout.shape.values()), mesh_dim_names=AXES)
        meshes["dense"] = mesh["dp_shard", "cp"]._flatten("fsdp")
        if layout.dp_replicate > 1:
            meshes["dense"] = mesh["dp_replicate", "dp_shard"]
        if layout.ep > 1:
            shape = layout.expert_shape
            axes = ("dp_replicate", "efsdp") if layout.dp_replicate > 1 else ("efsdp",)
            degrees = tuple(shape.values())
            meshes["experts"] = init_device_mesh("cpu", degrees, mesh_dim_names=tuple(shape))[axes]
    state = {}
    for name in SHAPES:
        if layout.place(rank)["pp"] not in stages_of(name, layout):
            continue
        spec = spec_of(name, layout, rank)
        mesh = meshes.get("experts" if "experts" in name else "dense", meshes.get("dense"))
        for key in (f"model.{name}", f"optim.{name}.exp_avg", f"optim.{name}.step"):
            tensor = whole[key].clone()
            if tensor.dim():
                if spec.dim is not None:
                    tensor = tensor.narrow(spec.dim, spec.start, spec.length).contiguous()
                if mesh is not None:
                    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
                    tensor = distribute_tensor(tensor, mesh, placements)
                tensor = stored_tensor(tensor, spec)
            state[key] = tensor
    return state


def memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.local if isinstance(tensor, LocalShard) else local_tensor(tensor)


def save_each(names: list[str], root: str) -> list[int]:
    """Save under each layout in the background; bytes that this rank wrote."""
    env = open_environment(module_config())
    sizes = []
    try:
        for name in names:
            tensors = held(LAYOUTS[name], env.rank, whole_state())
            shards = ShardWriter(env.checkpoint_group)
            copied = shards.copy(tensors)
            for tensor in tensors.values():  # training goes on
                memory(tensor).zero_()
            folder = Path(root) / name
            if env.is_main:
                folder.mkdir()
            env.barrier()
            order = Save(root=folder, step=1, tokens=0, engine=name, rank_state=dict)
            write_checkpoint(order, shards, copied, rank=env.rank, group=env.checkpoint_group)
            sizes.append(shards.nbytes)
        return sizes
    finally:
        env.close()


def load_each(names: list[str], checkpoints: list[str]) -> list[str]:
    """Load each checkpoint under each layout; what is not as it was cut."""
    env = open_environment(module_config())
    wrong = []
    try:
        for name in names:
            tensors = held(LAYOUTS[name], env.rank, whole_state())
            expected = {key: memory(tensor).clone() for key, tensor in tensors.items()}
            for checkpoint in checkpoints:
                for tensor in tensors.values():
                    memory(tensor).fill_(float("nan"))
                load_checkpoint(
                    Path(checkpoint), tensors=tensors, rank=env.rank, group=env.cpu_group
                )
                wrong += [
                    f"{checkpoint} -> {name}, rank {env.rank}: {key}"
                    for key, tensor in tensors.items()
                    if not torch.equal(memory(tensor), expected[key])
                ]
        return wrong
    finally:
        env.close()


def test_every_layout_loads_what_every_layout_has_saved(
    workers: WorkerPool, tmp_path: Path
) -> None:
    by_size: dict[int, list[str]] = {}
    for name, layout in LAYOUTS.items():
        by_size.setdefault(layout.world_size, []).append(name)
    whole = whole_state()
    for ranks, names in by_size.items():
        written = workers.run(ranks, save_each, names, str(tmp_path))
        # Copies of several ranks are written once.
        totals = [sum(sizes) for sizes in zip(*written, strict=True)]
        assert totals == [sum(tensor.nbytes for tensor in whole.values())] * len(names)
    checkpoints = [tmp_path / name / "step1" for name in LAYOUTS]
    for checkpoint in checkpoints:
        check_files(checkpoint, read_metadata(checkpoint), hashes=True)
        stored = dict(iterate_tensors(checkpoint / "model_and_optim", ""))
        assert differences(stored, whole) == [], checkpoint
    for ranks, names in by_size.items():
        wrong = workers.run(ranks, load_each, names, [str(c) for c in checkpoints])
        assert [line for lines in wrong for line in lines] == []


def load_what_is_not_there(checkpoint: str) -> str:
    env = open_environment(module_config())
    try:
        name = "model.head.norm.weight" if env.rank == 0 else "model.unknown"
        tensors = {name: torch.zeros(SHAPES["head.norm.weight"])}
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(Path(checkpoint), tensors=tensors, rank=env.rank, group=env.cpu_group)
        return str(caught.value)
    finally:
        env.close()


def test_what_one_stage_misses_ends_all(workers: WorkerPool, tmp_path: Path) -> None:
    state: dict[str, Any] = {"tensors": whole_state(), "rank_state": {}}
    save_checkpoint(tmp_path, step=1, tokens=0, engine="single", rank=0, group=None, **state)
    found = workers.run(2, load_what_is_not_there, str(tmp_path / "step1"))
    assert all("has no tensor model.unknown" in message for message in found)
