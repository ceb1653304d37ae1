"""Choices of experts with sigmoid scores, groups and biases, and how biases move."""

from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.models.layer_configs import MoEConfig
from toolkit.models.router import Router, router_sums, update_biases

EXPERTS, WIDTH = 12, 8
DEEPSEEK: dict[str, Any] = {
    "num_experts": EXPERTS,
    "top_k": 3,
    "intermediate_size": 4,
    "score_function": "sigmoid",
    "scaling_factor": 2.5,
    "num_groups": 4,
    "top_k_groups": 2,
    "bias_update_rate": 0.01,
}


def router(**changes: Any) -> Router:
    made = Router(WIDTH, MoEConfig(**(DEEPSEEK | changes))).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.weight.normal_(generator=generator)
        if made.score_bias is not None:
            made.score_bias.normal_(generator=generator)
    return made


def one_token(made: Router, token: Tensor, moe: MoEConfig) -> dict[int, Tensor]:
    """The definition, written down for one token: expert -> weight."""
    logits = made.weight @ token
    scores = logits.sigmoid() if moe.score_function == "sigmoid" else logits.softmax(0)
    by_choice = scores if made.score_bias is None else scores + made.score_bias
    groups = by_choice.split(EXPERTS // moe.num_groups)
    highest = 2 if moe.score_function == "sigmoid" else 1
    value = [sum(sorted(group.tolist())[-highest:]) for group in groups]
    best = sorted(range(len(groups)), key=lambda n: -value[n])[: moe.top_k_groups]
    size = EXPERTS // moe.num_groups
    allowed = [n for n in range(EXPERTS) if n // size in best]
    chosen = sorted(allowed, key=lambda n: -by_choice[n].item())[: moe.top_k]
    total = sum(scores[n] for n in chosen) if moe.normalize_top_k else 1.0
    return {n: scores[n] / total * moe.scaling_factor for n in chosen}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize_top_k": False, "num_groups": 1, "top_k_groups": 1},
        {"bias_update_rate": None, "scaling_factor": 1.0},
        {"score_function": "softmax"},
        {"score_function": "softmax", "bias_update_rate": None, "normalize_top_k": False},
        {"num_groups": 6, "top_k_groups": 2, "top_k": 4},  # all experts of both groups
    ],
    ids=str,
)
def test_choices_and_weights_follow_their_definition(changes: dict[str, Any]) -> None:
    made, moe = router(**changes), MoEConfig(**(DEEPSEEK | changes))
    tokens = torch.randn(40, WIDTH, dtype=torch.float64, requires_grad=True)
    _, experts, weights = made(tokens)
    expected = [one_token(made, token, moe) for token in tokens]
    assert experts.tolist() == [list(choice) for choice in expected]
    wanted = torch.stack([torch.stack(list(choice.values())) for choice in expected])
    torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=0)
    direction = torch.randn_like(weights)
    got = torch.autograd.grad((weights * direction).sum(), [tokens, made.weight])
    want = torch.autograd.grad((wanted * direction).sum(), [tokens, made.weight])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_token_chooses_alike_alone_and_among_others() -> None:
    made, tokens = router(), torch.randn(9, WIDTH, dtype=torch.float64)
    _, experts, weights = made(tokens)
    for n in range(9):
        alone = made(tokens[n : n + 1])
        assert torch.equal(alone.experts[0], experts[n])
        torch.testing.assert_close(alone.weights[0], weights[n], rtol=1e-12, atol=0)


def test_experts_of_other_groups_are_never_chosen_though_all_scores_are_negative() -> None:
    made = router()
    assert made.score_bias is not None
    made.score_bias.fill_(-5.0)
    made.score_bias[:3] = -4.0
    experts = made(torch.randn(50, WIDTH, dtype=torch.float64)).experts // 3
    assert (experts == 0).any(1).all()
    assert all(len(set(groups)) <= 2 for groups in experts.tolist())


def test_zero_scores_give_no_nan() -> None:
    made = router()
    with torch.no_grad():
        made.weight.fill_(-1e4)
    assert torch.equal(
        made(torch.ones(1, WIDTH, dtype=torch.float64)).weights, torch.zeros(1, 3).double()
    )


def test_biases_move_towards_an_even_load() -> None:
    biases = {2: torch.tensor([0.5, 0.0, 0.0, -0.5]), 0: torch.zeros(4)}
    load = torch.tensor([[5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 9.0, 9.0], [8.0, 2.0, 4.0, 2.0]])
    update_biases(biases, load, torch.tensor(0.0), rate=0.25)
    assert biases[2].tolist() == [0.25, 0.25, 0.0, -0.25]
    assert biases[0].tolist() == [0.0] * 4
    update_biases(biases, load, torch.tensor(1.0), rate=0.25)  # the step was left out
    assert biases[2].tolist() == [0.25, 0.25, 0.0, -0.25]


def test_biases_even_out_the_load() -> None:
    torch.manual_seed(0)
    made, tokens = router(), torch.randn(300, WIDTH, dtype=torch.float64)
    assert made.score_bias is not None
    made.score_bias.zero_()
    busiest = []
    for _ in range(80):
        load = torch.bincount(made(tokens).experts.flatten(), minlength=EXPERTS).double()
        busiest.append((load.max() / load.mean()).item())
        update_biases({0: made.score_bias}, load[None], torch.tensor(0.0), rate=0.01)
    assert busiest[0] > 1.5
    assert max(busiest[-5:]) < 1.2


def test_balance_of_sigmoids_is_of_their_shares() -> None:
    logits = torch.randn(10, 5, dtype=torch.float64)
    experts = logits.topk(2, dim=-1).indices
    is_target = torch.ones(2, 5, dtype=torch.bool)
    is_target[0, 2:] = False
    sums = router_sums(logits, experts, is_target, is_sigmoid=True)
    expected = 0.0
    for row in range(2):
        mine = logits.view(2, 5, 5)[row][is_target[row]].sigmoid()
        share = mine / mine.sum(-1, keepdim=True)
        chosen = experts.view(2, 5, 2)[row][is_target[row]].flatten()
        often = torch.bincount(chosen, minlength=5).double() / (2 * len(mine))
        expected += len(mine) * 5 * (often * share.mean(0)).sum().item()
    assert sums.balance.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 5}, "num_experts 12 is not divisible by num_groups 5"),
        ({"top_k_groups": 5}, "top_k_groups 5 is more than num_groups 4"),
        ({"top_k": 7}, "top_k 7 is more than the 6 experts of 2 of 4 groups; raise top_k_groups"),
        ({"num_groups": 12, "top_k_groups": 3}, "leaves one expert a group"),
        ({"bias_update_rate": -1.0}, "bias_update_rate must not be negative"),
        ({"scaling_factor": 0.0}, "scaling_factor must be greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**(DEEPSEEK | changes))
