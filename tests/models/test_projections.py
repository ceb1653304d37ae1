"""Query, key and value as one product, gate and up as one, where that is faster."""

from typing import Any

import pytest
import torch

from tests.models.test_compile import CONFIG, batch
from toolkit.models import projections
from toolkit.models.compile import compile_model
from toolkit.models.lora import choose_trained
from toolkit.models.lora_config import LoRAConfig


def products_in(graphs: list[torch.fx.GraphModule]) -> int:
    linear = torch.nn.functional.linear
    return sum(node.target is linear for graph in graphs for node in graph.graph.nodes)


def compiled(model: torch.nn.Module) -> tuple[torch.nn.Module, list[torch.fx.GraphModule]]:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compile_model(model, fullgraph=True, backend=keep)
    return model, graphs


@pytest.mark.parametrize("bias", [False, True])
def test_joined_products_give_the_same_numbers_and_gradients(
    monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    config = CONFIG.replace(bias=bias, qk_norm="full", num_layers=1)
    apart, together = config.build(), config.build()
    names = [name for name, _ in apart.named_parameters()]
    expected = apart(*batch()).loss
    expected.backward()
    monkeypatch.setattr(projections, "joins_products", lambda _: True)
    model, graphs = compiled(together)
    got = model(*batch()).loss
    got.backward()
    assert products_in(graphs) == 4  # 7 apart
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert [name for name, _ in together.named_parameters()] == names
    for a, b in zip(apart.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["adapter", "hook"])
def test_layers_that_are_more_than_a_product_stay_apart(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(projections, "joins_products", lambda _: True)
    with torch.device("meta"):
        model = CONFIG.replace(num_layers=1).build(init_device="meta")
    attention: Any = model.blocks[0].attention
    if change == "adapter":
        choose_trained(model, lora=LoRAConfig(target_modules=["blocks.*.attention.query"]))
    calls = []
    model.to_empty(device="cpu")
    if change == "hook":
        attention.query.register_forward_hook(lambda *_: calls.append(1))
    model, graphs = compiled(model)
    model(batch()[0])
    joined = 4 + 2  # query, key and value apart; gate and up are one
    assert products_in(graphs) == joined + 2 * (change == "adapter")
    assert len(calls) == (change == "hook")
