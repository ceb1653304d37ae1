from collections.abc import Iterator

import pytest
import torch

from toolkit.data.prefetch import prefetch_to_device


def batches(number: int, *, pin: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    for n in range(number):
        ids = torch.full((4, 256), n)
        yield {"input_ids": ids.pin_memory() if pin else ids}


def test_on_a_cpu_batches_pass_as_they_are() -> None:
    given = list(batches(3))
    found = list(prefetch_to_device(given, torch.device("cpu")))
    assert all(a is b for a, b in zip(given, found, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_batch_arrives_whole_and_in_order() -> None:
    device = torch.device("cuda", 0)
    sums = []
    for batch in prefetch_to_device(batches(50, pin=True), device):
        assert batch["input_ids"].device == device
        busy = torch.randn(512, 512, device=device)
        for _ in range(5):
            busy = busy @ busy  # the copy of the next batch runs meanwhile
        sums.append(batch["input_ids"].sum())
    assert [int(total) for total in sums] == [n * 1024 for n in range(50)]


@pytest.mark.parametrize("number", [0, 1])
def test_few_batches_are_all_given(number: int) -> None:
    assert len(list(prefetch_to_device(batches(number), torch.device("cpu")))) == number
