import pytest
import torch

from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.distributed.materialize import apply_activation_checkpointing
from toolkit.models.compile import compile_model
from toolkit.models.config import TransformerConfig


@pytest.mark.parametrize("mode", ["none", "full"])
def test_checkpointed_blocks_are_compiled(mode: str) -> None:
    """Not run eagerly in silence, which the same losses would not show."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    config = TransformerConfig(
        vocab_size=32, d_model=16, num_layers=2, num_heads=2, intermediate_size=32
    )
    model, eager = config.build(), config.build()
    if mode == "full":
        apply_activation_checkpointing(model.blocks, ActivationCheckpointingConfig(mode="full"))
    torch._dynamo.reset()
    compile_model(model, fullgraph=True, backend=count)
    ids = torch.arange(24).reshape(2, 12)
    losses = [m(ids, ids).loss for m in (model, eager)]
    for loss in losses:
        loss.backward()
    assert len(graphs) == 2  # one for all blocks, and the loss
    assert torch.equal(*losses)
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
