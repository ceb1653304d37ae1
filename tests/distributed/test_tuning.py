"""Which processors compute fp32 products with oneDNN."""

from typing import Any

import pytest
import torch

from toolkit.distributed.tuning import take_fast_products
from toolkit.models.shapes import loss_chunk_rows

matmul: Any = torch.backends.mkldnn.matmul
AMD = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_bf16": False}


@pytest.fixture(autouse=True)
def _restored():
    before = matmul.fp32_precision
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = before


@pytest.mark.parametrize(
    "changes", [{"cpu_name": "INTEL(R) XEON(R)"}, {"avx512_f": False}, {"amx_bf16": True}]
)
def test_other_processors_keep_theirs(monkeypatch: pytest.MonkeyPatch, changes) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD | changes)
    take_fast_products()
    assert matmul.fp32_precision == "ieee"


def test_with_gpus_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    take_fast_products()
    assert matmul.fp32_precision == "ieee"


def test_products_that_round_operands_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    take_fast_products()
    assert matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "baddbmm", "linear", "tall"])
def test_each_kind_of_product_is_looked_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place: Any = torch.nn.functional if name == "linear" else torch
    function = "mm" if name == "tall" else name
    true = getattr(place, function)

    def rounding(*operands: torch.Tensor) -> torch.Tensor:
        product = true(*operands)
        return product.bfloat16().float() if name != "tall" or len(product) > 1000 else product

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    monkeypatch.setattr(place, function, rounding)
    take_fast_products()
    assert matmul.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == "highest"


def test_libraries_may_still_ask_how_products_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    take_fast_products()
    assert torch.get_float32_matmul_precision() in ("medium", "highest")
    assert torch.backends.cuda.matmul.allow_tf32 in (True, False)


def test_it_does_not_matter_who_has_set_another_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    for _ in range(2):
        take_fast_products()
        torch.backends.cuda.matmul.allow_tf32 = False


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
