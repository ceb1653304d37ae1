"""Steps of nanochat and torchtitan, by their own code, for `gpu_counts.py`."""

import sys
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from benchmarks._op_counting import OpCounter, counted_kernels


def _attend(query: Any, key: Any, value: Any, **_: Any) -> Any:
    """In the place of nanochat's FlashAttention 3."""
    heads = (x.transpose(1, 2) for x in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)


def nanochat(path: str, size: Any) -> tuple[OpCounter, OpCounter]:
    """Forward and backward of its d12; its optimizer is Muon in kernels of its own, not counted."""
    sys.path.insert(0, path)
    from nanochat import gpt

    gpt.has_ve = lambda *_: False  # value embeddings are a part that other models have not
    counter = OpCounter()
    gpt.flash_attn.flash_attn_func = _attend
    config = gpt.GPTConfig(sequence_len=size.length, window_pattern="L")
    with FakeTensorMode(), counted_kernels(counter):
        model = gpt.GPT(config)
        tokens = model.transformer.wte  # its table is kept in the compute type
        tokens.weight = nn.Parameter(tokens.weight.detach().to(gpt.COMPUTE_DTYPE))
        ids = torch.zeros(size.rows, size.length, dtype=torch.int64)
        with counter:
            for _ in range(size.passes):
                (model(ids, ids) / size.passes).backward()
    return counter, OpCounter()


class _Attend(nn.Module):
    """In the place of torchtitan's flex attention: one operator, as attention is for the others."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, query: Any, key: Any, value: Any, **_: Any) -> Any:
        heads = (x.unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


def nanochat_block(path: str) -> tuple[Any, tuple]:
    """A small block of it, and inputs."""
    sys.path.insert(0, path)
    from nanochat import gpt

    gpt.has_ve = lambda *_: False
    gpt.flash_attn.flash_attn_func = _attend
    config = gpt.GPTConfig(sequence_len=64, n_layer=1, n_head=4, n_kv_head=2, n_embd=128)
    block = gpt.Block(config, 0)
    cos_sin = gpt.GPT(config)._precompute_rotary_embeddings(64, 32, device="cpu")
    stream = torch.randn(2, 64, 128, dtype=torch.bfloat16, requires_grad=True)
    return block, (stream, None, cos_sin, (64, 0), None)


def torchtitan_block(path: str) -> tuple[Any, tuple]:
    """The same of torchtitan's smallest Llama, in bf16 as FSDP gathers it."""
    sys.path.insert(0, path)
    from torchtitan.models import llama3

    model: Any = llama3.llama3_configs["debugmodel"]("flex").build()
    model.init_states(buffer_device=torch.device("cpu"))
    block = model.layers["0"].to(torch.bfloat16)
    block.attention.inner_attention = _Attend(2)
    stream = torch.randn(128, 256, dtype=torch.bfloat16, requires_grad=True)
    return block, (stream, None, torch.arange(64).repeat(2))


def torchtitan(path: str, flavor: str, size: Any) -> tuple[OpCounter, OpCounter]:
    """Forward, backward, clipping and AdamW under its FSDP, over the ranks of the default group."""
    sys.path.insert(0, path)
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
    from torchtitan.models import llama3
    from torchtitan.protocols import module as protocol

    ranks = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    config = llama3.llama3_configs[flavor]("flex")
    computing, stepping = OpCounter(), OpCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), counted_kernels(computing):
        model: Any = config.build()
        protocol.Module._init_param = lambda *_, **__: None  # reads values
        model.init_states(buffer_device=torch.device("cpu"))
        for layer in model.layers.values():
            layer.attention.inner_attention = _Attend(size.rows)
        apply_fsdp_to_decoder(
            model,
            mesh,
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            pp_enabled=False,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        ids = torch.zeros(size.rows * size.length, dtype=torch.int64)  # rows lie in one
        places = torch.arange(size.length).repeat(size.rows)
        with computing:
            for _ in range(size.passes):
                cross_entropy_loss(model(ids, positions=places), ids).backward()
        with stepping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
    assert isinstance(model, FSDPModule)
    return computing, stepping
