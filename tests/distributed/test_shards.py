"""What a rank holds of a tensor: its boxes, their initial values, their checkpoints, their sums."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.tiny import global_batch, module_config, open_environment, tiny_model
from tests.workers import WorkerPool
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.load import load_checkpoint
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.distributed.engine import Microbatch
from toolkit.distributed.layout import Layout
from toolkit.distributed.materialize import materialize
from toolkit.distributed.shards import (
    Box,
    LocalShard,
    ShardSpec,
    draw_initial_values,
    flat_range_boxes,
    flat_runs,
    local_boxes,
    stored_tensor,
)
from toolkit.distributed.torch_engine import TorchEngine
from toolkit.models.init import InitSpec, fill_flat_
from toolkit.models.loss import shift_labels
from toolkit.optim.config import SGDConfig


@given(st.data())
def test_boxes_cover_the_range_exactly_once_and_are_few(data: st.DataObject) -> None:
    shape = torch.Size(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    numel = shape.numel()
    start = data.draw(st.integers(0, numel))
    length = data.draw(st.integers(0, numel - start))
    boxes = flat_range_boxes(shape, start, length)
    assert len(boxes) <= 2 * (len(shape) - 1) + 1
    whole = torch.arange(numel).reshape(shape)
    seen = torch.full((length,), -1)
    for offsets, sizes, position in boxes:
        index = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        part = whole[index].reshape(-1)
        assert torch.equal(seen[position : position + len(part)], torch.full_like(part, -1))
        seen[position : position + len(part)] = part
    assert torch.equal(seen, torch.arange(start, start + length))


def test_a_piece_is_the_live_memory_and_no_more_of_it() -> None:
    flat = torch.arange(20.0)
    shard = LocalShard.flat(flat.narrow(0, 4, 9), shape=torch.Size([5, 3]), start=2)
    pieces = [
        shard.__get_tensor_shard__(item.index) for item in shard.__create_write_items__("x", shard)
    ]
    assert [piece.tolist() for piece in pieces] == [[[4]], [[5, 6, 7], [8, 9, 10]], [[11, 12]]]
    assert all(piece.untyped_storage().nbytes() == piece.nbytes for piece in pieces)
    pieces[1].fill_(-1)
    assert flat.tolist() == [0, 1, 2, 3, 4, *[-1] * 6, *range(11, 20)]


@given(st.data())
def test_runs_of_a_box_are_its_elements_in_order(data: st.DataObject) -> None:
    shape = torch.Size(data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(
        data.draw(st.integers(1, size - offset))
        for size, offset in zip(shape, offsets, strict=True)
    )
    whole = torch.arange(shape.numel()).reshape(shape)
    expected = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
    found = torch.full((expected.numel(),), -1)
    for position, start, length in flat_runs(shape, Box(offsets, sizes, 0)):
        found[position : position + length] = torch.arange(start, start + length)
    assert torch.equal(found, expected.reshape(-1))


CUTS = [
    # (dimension that the module's part is cut along, dimension that FSDP2 shards)
    (0, 0),
    (0, 1),
    (1, 0),
    (2, 1),
    # Flattened before it is sharded.
    (0, None),
    (1, None),
]
SHAPE = torch.Size((6, 8, 4))
NORMAL = InitSpec("normal", 0.02)


def cut_and_sharded(cut: int, sharded: int | None, folder: str) -> tuple[bool, list[Box]]:
    """Half of a parameter on each of two pairs of ranks, sharded inside the pair: drawn, saved and
    loaded again; whether the values drawn are those of the whole."""
    env = open_environment(module_config("ddp"))
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp_shard"))
        half = SHAPE[cut] // 2
        start = mesh.get_local_rank("tp") * half
        spec = ShardSpec(SHAPE, dim=cut, start=start, length=half)
        part = torch.zeros(*SHAPE[:cut], half, *SHAPE[cut + 1 :])
        part = part.flatten(0, 1) if sharded is None else part
        tensor = distribute_tensor(part, mesh["dp_shard"], [Shard(sharded or 0)])
        draw_initial_values({"w": tensor}, {"w": NORMAL}, {"w": spec}, 3)
        whole = fill_flat_(
            torch.empty(SHAPE.numel()), name="w", numel=SHAPE.numel(), start=0, spec=NORMAL, seed=3
        ).view(SHAPE)
        mine = whole.narrow(cut, start, half)
        mine = mine.flatten(0, 1) if sharded is None else mine
        mine = mine.chunk(2, dim=sharded or 0)[mesh.get_local_rank("dp_shard")]
        is_drawn = torch.equal(tensor.to_local(), mine)
        tensors = {"model.w": stored_tensor(tensor, spec)}
        save: dict[str, Any] = {"tokens": 0, "rank_state": {}, "engine": "fsdp", "rank": env.rank}
        save_checkpoint(Path(folder), step=1, tensors=tensors, group=env.cpu_group, **save)
        tensor.to_local().zero_()
        load_checkpoint(Path(folder) / "step1", tensors=tensors, rank=env.rank, group=env.cpu_group)
        return is_drawn and torch.equal(tensor.to_local(), mine), local_boxes(tensor, spec)
    finally:
        env.close()


@pytest.mark.parametrize(("cut", "sharded"), CUTS)
def test_a_parameter_that_is_cut_and_sharded_is_drawn_saved_and_loaded_as_part_of_the_whole(
    workers: WorkerPool, tmp_path: Path, cut: int, sharded: int | None
) -> None:
    ranks = workers.run(4, cut_and_sharded, cut, sharded, str(tmp_path))
    assert [equal for equal, _ in ranks] == [True] * 4
    covered = torch.zeros(SHAPE)
    for _, boxes in ranks:
        for offsets, sizes, _ in boxes:
            covered[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    assert torch.equal(covered, torch.ones(SHAPE))
    (whole,) = (t for _, t in iterate_tensors(tmp_path / "step1" / "model_and_optim", ""))
    expected = fill_flat_(
        torch.empty(SHAPE.numel()), name="w", numel=SHAPE.numel(), start=0, spec=NORMAL, seed=3
    )
    assert torch.equal(whole, expected.view(SHAPE))


def history_of_halves(tp: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Steps and norms by layer of a model that each of `tp` ranks holds whole, with a summand of
    every gradient."""
    config = module_config("fsdp", max_grad_norm=0.1, optim=SGDConfig(lr=0.1, momentum=0.9))
    env = open_environment(config)
    try:
        env = dataclasses.replace(env, layout=Layout(tp=tp, is_fsdp=True, precision="fp32"))
        model = tiny_model().build(init_device="meta")
        with mock.patch("toolkit.distributed.materialize._cut"):  # each rank holds all of it
            table = materialize(model, env)
        if tp > 1:
            for name, spec in table.items():
                table[name] = spec._replace(partial_over=("tp",), copies=tp)
        engine = TorchEngine(env, model, table, config.optim.build)
        history = []
        for step in range(3):
            ids = global_batch(step)
            labels = shift_labels(ids, None, None)
            count = (labels >= 0).sum()
            sums = engine.forward_backward(Microbatch(ids, labels).split(4), 1 / count / tp)
            squares = engine.grad_squares()
            outcome = engine.step(0.1)
            history.append({"loss": sums.ce.item(), "grad_norm": outcome.grad_norm.item()})
        weights = engine.weight_squares()
        return history, {k: v.item() for k, v in (squares | weights).items()}
    finally:
        env.close()


def test_gradients_in_parts_add_up_and_copies_count_once(workers: WorkerPool) -> None:
    (alone,) = workers.run(1, history_of_halves, 1)
    for history, squares in workers.run(2, history_of_halves, 2):
        # Two halves are exactly the whole.
        assert [step["loss"] for step in history] == [step["loss"] for step in alone[0]]
        for got, want in zip(history, alone[0], strict=True):
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-6)
        assert squares == pytest.approx(alone[1], rel=1e-6)
