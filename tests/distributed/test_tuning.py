"""Which processors compute fp32 products with oneDNN."""

import pytest
import torch

from toolkit.distributed.tuning import take_fast_products
from toolkit.models.shapes import loss_chunk_rows

AMD = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_bf16": False}


@pytest.fixture(autouse=True)
def _restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "changes", [{"cpu_name": "INTEL(R) XEON(R)"}, {"avx512_f": False}, {"amx_bf16": True}]
)
def test_other_processors_keep_theirs(monkeypatch: pytest.MonkeyPatch, changes) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD | changes)
    take_fast_products()
    assert torch.get_float32_matmul_precision() == "highest"


def test_with_gpus_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    take_fast_products()
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_that_round_operands_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    take_fast_products()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("shape", [(200, 300, 400), (7, 64, 1000), (512, 512, 512)])
def test_products_of_this_machine_stay_those_of_fp32(shape) -> None:
    take_fast_products()
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator)
    b = torch.randn(columns, inner, generator=generator)
    for got, expected in (
        (a @ b.t(), a.double() @ b.double().t()),
        (torch.stack([a, a]) @ b.t(), (a.double() @ b.double().t()).expand(2, -1, -1)),
    ):
        assert (got - expected).abs().max() < 1e-6 * inner


def test_chunks_of_the_loss_have_so_many_bytes_of_logits_unless_rows_are_given() -> None:
    assert loss_chunk_rows(None, 8192, "cpu") == 1024
    assert loss_chunk_rows(None, 131_072, "cpu") == 256
    assert loss_chunk_rows(None, 131_072, "cuda") == 2048
    assert loss_chunk_rows(7, 8192, "cpu") == 7
