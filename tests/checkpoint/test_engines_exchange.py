"""A checkpoint of one engine continues under another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.checkpoint.exchange import (
    CELLS,
    EXPERTS,
    LAYOUT_CELLS,
    SAVED_AT,
    VARIANTS,
    Cell,
    State,
    continue_each,
    differences,
    save_and_go_on,
    stored,
)
from tests.workers import WorkerPool
from toolkit.checkpoint.folder import check_files, read_metadata

STEP = f"step{SAVED_AT}"
ODD = ("adamw-uneven-tied-frozen-groups", "sgd-uneven-frozen-groups")


def slow(*case: object) -> Any:
    """What others in the same list say apart: an engine here, a variant there."""
    return pytest.param(*case, marks=pytest.mark.slow)


EVERY_ENGINE = [
    Cell("ddp", 4),  # where the order of additions matters
    *(Cell(engine, 2) for engine in ("fsdp", "fsdp+offload", "zero1", "zero2+offload")),
    *(Cell(engine, 2) for engine in ("zero3", "zero3+offload")),
    slow(Cell("zero2", 2)),
    Cell("hsdp", 4),
]
# 4 ranks: the last of them owns no row of some parameters.
ODD_CELLS = [
    *((variant, Cell("fsdp", 4)) for variant in ODD),
    *((variant, Cell("zero1", 2)) for variant in ODD),
    (ODD[0], Cell("zero3", 4)),
    slow(ODD[1], Cell("zero3", 4)),
]


# Parts of matrices and of experts, copies of several ranks, and stages, two of which have the tied
# embeddings.
LAYOUTS = [slow(Cell("fsdp+tp", 4)), Cell("hsdp+ep", 4), Cell("fsdp+pp+tp", 4)]


class Reference(NamedTuple):
    """A run of `single` that was not interrupted, and its checkpoint."""

    checkpoint: Path
    losses: list[float]
    state: State


@pytest.fixture(scope="module")
def reference(
    workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def make(variant: str) -> Reference:
        if variant not in made:
            root = tmp_path_factory.mktemp("reference")
            history = workers.run(1, save_and_go_on, "single", variant, str(root))[0]
            made[variant] = Reference(root / STEP, losses(history), stored(root / STEP))
        return made[variant]

    return make


def losses(history: list[dict[str, float]]) -> list[float]:
    return [metrics["loss"] for metrics in history]


def check_both_ways(
    workers: WorkerPool, cell: Cell, variant: str, expected: Reference, folder: Path
) -> None:
    """`cell` continues the reference and itself; `single` continues `cell`."""
    own = workers.run(cell.ranks, save_and_go_on, cell.engine, variant, str(folder / "own"))[0]
    checkpoint = folder / "own" / STEP
    check_files(checkpoint, read_metadata(checkpoint), hashes=True)
    sources = [str(expected.checkpoint), str(checkpoint)]
    histories = workers.run(
        cell.ranks, continue_each, cell.engine, variant, sources, str(folder / "again")
    )[0]
    assert losses(histories[0]) == pytest.approx(expected.losses, rel=1e-5)
    assert histories[1] == own  # bit for bit, norms too
    assert differences(stored(folder / "again" / "0" / STEP), expected.state) == []
    state = stored(checkpoint)
    assert differences(stored(folder / "again" / "1" / STEP), state) == []
    back = workers.run(1, continue_each, "single", variant, sources[1:], str(folder / "back"))[0][0]
    assert losses(back) == pytest.approx(losses(own), rel=1e-5)
    assert differences(stored(folder / "back" / "0" / STEP), state) == []


@pytest.mark.parametrize("cell", EVERY_ENGINE, ids=str)
def test_every_engine_continues_single_and_itself_and_single_continues_it(
    workers: WorkerPool, reference: Callable[[str], Reference], cell: Cell, tmp_path: Path
) -> None:
    check_both_ways(workers, cell, "adamw", reference("adamw"), tmp_path)


@pytest.mark.parametrize("cell", LAYOUTS, ids=str)
def test_every_layout_continues_single_and_itself_and_single_continues_it(
    workers: WorkerPool, reference: Callable[[str], Reference], cell: Cell, tmp_path: Path
) -> None:
    check_both_ways(workers, cell, EXPERTS, reference(EXPERTS), tmp_path)


@pytest.mark.parametrize(("variant", "cell"), ODD_CELLS, ids=str)
def test_uneven_shards_frozen_parameters_and_groups_travel_too(
    workers: WorkerPool,
    reference: Callable[[str], Reference],
    variant: str,
    cell: Cell,
    tmp_path: Path,
) -> None:
    check_both_ways(workers, cell, variant, reference(variant), tmp_path)


@pytest.mark.parametrize(
    ("variant", "cell"),
    [
        ("adamw-experts", Cell("fsdp", 4)),
        slow("adamw-experts", Cell("zero3", 2)),
        ("adamw-experts-flattened", Cell("fsdp", 4)),
        slow("adamw-experts-flattened", Cell("hsdp", 4)),
    ],
    ids=str,
)
def test_stacked_experts_travel_too(
    workers: WorkerPool,
    reference: Callable[[str], Reference],
    variant: str,
    cell: Cell,
    tmp_path: Path,
) -> None:
    expected = reference(variant)
    assert expected.state["model.blocks.1.feed_forward.experts.gate"].shape[0] == 3
    check_both_ways(workers, cell, variant, expected, tmp_path)


def test_frozen_parameters_are_saved_without_moments(
    reference: Callable[[str], Reference],
) -> None:
    state = reference("sgd-uneven-frozen-groups").state
    assert "model.embeddings.tokens.weight" in state
    buffers = [name for name in state if name.startswith("optim.")]
    assert len(buffers) == 17  # of 22 parameters: two are frozen, three have no momentum
    assert not [name for name in buffers if ".embeddings." in name or "blocks" not in name]


def test_torch_reads_the_format_by_itself(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    expected = reference("adamw")
    dcp_to_torch_save(expected.checkpoint / "model_and_optim", tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert differences(_flat(found), expected.state) == []


def _flat(nested: dict, prefix: str = "") -> State:
    flat: State = {}
    for name, value in nested.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return flat


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("variant", "cells"),
    [*((variant, CELLS) for variant in VARIANTS if variant != EXPERTS), (EXPERTS, LAYOUT_CELLS)],
)
def test_all_pairs_of_engines_layouts_and_ranks(
    workers: WorkerPool, variant: str, cells: list[Cell], tmp_path: Path
) -> None:
    """Every cell saves, every cell continues each of the checkpoints."""
    expected: list[list[dict[str, float]]] = []
    folders = [tmp_path / str(cell) for cell in cells]
    for cell, folder in zip(cells, folders, strict=True):
        history = workers.run(cell.ranks, save_and_go_on, cell.engine, variant, str(folder))[0]
        expected.append(history)
        saved = stored(folder / STEP)
        dcp_to_torch_save(folder / STEP / "model_and_optim", tmp_path / "state.pt")
        assert differences(_flat(torch.load(tmp_path / "state.pt")), saved) == [], cell
    states = [stored(folder / STEP) for folder in folders]
    sources = [str(folder / STEP) for folder in folders]
    failures = []
    for cell in cells:
        again = tmp_path / f"again-{cell}"
        histories = workers.run(
            cell.ranks, continue_each, cell.engine, variant, sources, str(again), timeout=600
        )[0]
        for index, (source, found, wanted) in enumerate(
            zip(cells, histories, expected, strict=True)
        ):
            pair = f"{source} -> {cell}"
            if changed := differences(stored(again / str(index) / STEP), states[index]):
                failures.append(f"{pair}: {changed}")
            if losses(found) != pytest.approx(losses(wanted), rel=1e-5):
                failures.append(f"{pair}: {losses(found)} instead of {losses(wanted)}")
            if source == cell and found != wanted:
                failures.append(f"{pair}: not bit-equal")
    assert failures == []
