"""No process holds the whole model while it saves or loads: peak memory of real processes."""

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoint.exchange import Variant, config_of
from tests.tiny import SEQ, build, open_environment, train_steps
from tests.workers import WorkerPool, warm_pool
from toolkit.checkpoint.commit import Save, save_checkpoint, write_checkpoint
from toolkit.checkpoint.load import load_checkpoint
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.optim.config import AdamWConfig

MB = 1e6
BIG = {
    "vocab_size": 4096,
    "d_model": 512,
    "num_layers": 4,
    "num_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1366,
    "max_sequence_length": SEQ,
}
RANKS = 4


def peak_growth(action: Callable[[], object]) -> float:
    """Bytes by which the resident memory of this process grows at most while `action` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free already must not be used unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
    before = resident("VmRSS")
    action()
    return max(0.0, resident("VmHWM") - before)


def resident(field: str) -> float:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024.0


def measure_save(engine: str, root: str) -> dict[str, float]:
    """Peak growth of a blocking save, and of the copy and write of a background one."""
    config = config_of(engine, Variant(AdamWConfig(lr=1e-3)))
    env = open_environment(config)
    try:
        module = build(config, env, **BIG)
        train_steps(module, 0, 1)
        tensors = module.state_tensors()
        state_bytes = sum(t.numel() * t.element_size() for t in tensors.values())

        def save() -> None:
            save_checkpoint(
                Path(root), step=1, tokens=0, tensors=tensors, rank_state={}, engine=engine,
                rank=env.rank, group=env.cpu_group,
            )  # fmt: skip

        def copy_and_save() -> None:
            order = Save(
                root=Path(root), step=2, tokens=0, engine=engine, rank_state=lambda: {}
            )  # fmt: skip
            shards = ShardWriter(env.cpu_group)
            copied = shards.copy(tensors)
            write_checkpoint(order, shards, copied, rank=env.rank, group=env.cpu_group)

        shards = ShardWriter(env.cpu_group)
        shards.live(tensors)
        return {
            "state": state_bytes,
            "shard": shards.nbytes,
            "save": peak_growth(save),
            "copy and save": peak_growth(copy_and_save),
        }
    finally:
        env.close()


def measure_load(engine: str, checkpoint: str) -> float:
    """Peak growth of a load into a model that has all its state already."""
    config = config_of(engine, Variant(AdamWConfig(lr=1e-3)))
    env = open_environment(config, seed=99)
    try:
        module = build(config, env, **BIG)
        tensors = module.state_tensors()

        def load() -> None:
            load_checkpoint(Path(checkpoint), tensors=tensors, rank=env.rank, group=env.cpu_group)
            module.state_filled()

        return peak_growth(load)
    finally:
        env.close()


@pytest.fixture
def fresh() -> Iterator[Callable[[], WorkerPool]]:
    """Makes workers that have run nothing before, so that no freed memory serves them."""
    pools: list[WorkerPool] = []

    def make() -> WorkerPool:
        for pool in pools:
            pool.close()
        pools.append(warm_pool())
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["fsdp", "zero3", "fsdp+tp"])
def test_no_rank_holds_the_whole_model(
    fresh: Callable[[], WorkerPool],
    engine: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    saved = fresh().run(RANKS, measure_save, engine, str(tmp_path))
    fresh().run(1, measure_save, "single", str(tmp_path / "single"))
    own = fresh().run(RANKS, measure_load, engine, str(tmp_path / "step1"))
    foreign = fresh().run(RANKS, measure_load, engine, str(tmp_path / "single" / "step1"))
    state = max(rank["state"] for rank in saved)
    shard = max(rank["shard"] for rank in saved)
    assert state > 150 * MB
    assert shard < 0.3 * state
    peaks = {
        "save": max(rank["save"] for rank in saved),
        "copy and save": max(rank["copy and save"] for rank in saved),
        "load its own": max(own),
        "load single's": max(foreign),
    }
    record_property("MB", {name: round(value / MB) for name, value in peaks.items()})
    print(f"\n{engine}: state {state / MB:.0f} MB, shard {shard / MB:.0f} MB, peak growth "
          + ", ".join(f"{name} {value / MB:.0f} MB" for name, value in peaks.items()))  # fmt: skip
    buffer = 16 * MB  # a piece, a message
    assert peaks["save"] < 0.2 * shard + buffer
    assert peaks["copy and save"] < 1.1 * shard + buffer
    assert peaks["load its own"] < 0.2 * shard + buffer
    assert peaks["load single's"] < 0.2 * shard + buffer
