"""Losses at the ends of what numbers hold."""

import pytest
import torch

from toolkit.train.preference.config import ORPOConfig
from toolkit.train.preference.losses import Answers, log1mexp, orpo


@pytest.mark.parametrize("certain", [(True, False), (False, True), (True, True)])
def test_an_answer_of_probability_one_has_odds(certain: tuple[bool, bool]) -> None:
    chosen, rejected = (
        torch.tensor([0.0 if is_certain else -3.0], requires_grad=True) for is_certain in certain
    )
    found = orpo(ORPOConfig(), Answers(chosen, rejected, torch.ones(1), torch.ones(1)))
    found["loss"].sum().backward()
    for number in (found["loss"], chosen.grad, rejected.grad):
        assert number is not None
        assert torch.isfinite(number).all()
    assert chosen.grad < 0.0 <= rejected.grad


def test_log1mexp_is_exact() -> None:
    x = torch.tensor([-1e-6, -1e-3, -0.5, -0.7, -5.0])
    expected = torch.log(-torch.expm1(x.double()))
    torch.testing.assert_close(log1mexp(x).double(), expected, rtol=1e-6, atol=0)
