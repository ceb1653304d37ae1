"""The micro-benchmark: in time, without a trace, and never stuck with what is emulated."""

import time

import msgspec
import pytest
import torch

from tests.autotune.test_choices import question
from toolkit.autotune import measure as measuring
from toolkit.autotune.choices import Timings
from toolkit.autotune.question import Question, work_of
from toolkit.models.config import TransformerConfig


def test_measuring_draws_no_random_number_and_leaves_the_threads() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    timings = measuring.measure(question(threads=2), torch.device("cpu"))
    assert set(timings.precision) == {"fp32", "bf16"}
    assert all(seconds > 0 for seconds in timings.precision.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_model_of_any_size_is_measured_in_a_moment() -> None:
    model = TransformerConfig(
        vocab_size=128_000, d_model=8192, num_layers=80, num_heads=64, intermediate_size=28_672
    )
    large = msgspec.structs.replace(
        question(threads=1), **work_of(model, tokens=65_536, length=8192)._asdict()
    )
    started = time.process_time()
    timings = measuring.measure(large, torch.device("cpu"))
    # FLOPs of 65,536 tokens would take a core hours.
    assert time.process_time() - started < 10
    assert timings.precision["fp32"] > 3600


def test_emulated_bf16_is_not_looked_at_further(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[torch.dtype] = []

    def pieces(asked: Question, dtype: torch.dtype, budget: float) -> list[measuring._Piece]:
        kinds.append(dtype)
        return [measuring._Piece(lambda: None, 1.0)]

    monkeypatch.setattr(measuring, "_pilot", lambda: (1e11, 0.1))
    monkeypatch.setattr(measuring, "_pieces", pieces)
    monkeypatch.setattr(measuring, "machine_is_busy", lambda: False)
    timings = measuring.measure(question(threads=2), torch.device("cpu"))
    assert timings.precision["bf16"] == pytest.approx(10 * timings.precision["fp32"])
    assert kinds == [torch.float32]
    assert set(timings.threads) == {1, 2}  # they were asked for all the same


def test_threads_are_halved_while_that_is_no_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with 8 cores in sight and 2 to use."""
    seconds = {8: 9.0, 4: 3.0, 2: 1.0, 1: 2.0}
    current = [8]
    monkeypatch.setattr(torch, "set_num_threads", lambda number: current.__setitem__(0, number))
    monkeypatch.setattr(measuring, "_seconds", lambda run: seconds[current[0]])
    pieces = [measuring._Piece(lambda: None, 1.0)]
    assert measuring._fewer_threads(8, pieces, time.perf_counter() + 60) == seconds
    assert set(measuring._fewer_threads(8, pieces, 0.0)) == {8, 4}  # late, not without an answer


def test_a_busy_machine_compares_no_threads_and_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "machine_is_busy", lambda: True)
    timings = measuring.measure(question(threads=2), torch.device("cpu"))
    assert timings.threads == {}
    assert not timings.lasts


def test_gpus_measure_nothing_but_attention() -> None:
    asked = msgspec.structs.replace(question(), device="cuda", asks=frozenset({"precision"}))
    assert measuring.measure(asked, torch.device("cuda")) == Timings()
