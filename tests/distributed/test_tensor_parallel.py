"""Tensor parallelism computes what one process computes, for every part that a model may have."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.distributed.materialize import apply_activation_checkpointing
from toolkit.distributed.shards import ShardSpec, draw_initial_values, whole_specs
from toolkit.distributed.sizes import share_of_model
from toolkit.distributed.tensor_parallel import apply_tensor_parallel
from toolkit.models.compile import compile_model
from toolkit.models.config import TransformerConfig
from toolkit.models.init import canonical_parameters, init_spec
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.lora import choose_trained
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.loss import IGNORE_INDEX, shift_labels

ROWS, SEQ, VOCAB = 4, 18, 90
BOUND = 1e-12
"""Relative, in float64."""

MOE = MoEConfig(
    num_experts=6, top_k=2, intermediate_size=12, dense_layers=(0,),
    load_balancing_multiplier=0.05, router_z_loss_multiplier=0.02,
)  # fmt: skip
GPT2 = {"norm": "layer_norm", "positions": "learned", "feed_forward": "gelu", "bias": True}
GEMMA2 = {
    "norm_placement": "sandwich", "attention_soft_cap": 5.0, "logit_soft_cap": 2.0,
    "sliding_window": 5, "attention_pattern": ("sliding", "full"), "norm_weight_offset": 1.0,
    "feed_forward": "geglu", "embedding_scale": 5.5, "tie_embeddings": True,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "all heads have keys": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "olmo2": {"norm_placement": "reordered", "qk_norm": "full"},
    "olmo2, one key head": {"qk_norm": "full", "num_key_value_heads": 1},
    "layer norm of all heads": {**GPT2, "qk_norm": "full", "num_key_value_heads": 1},
    "qwen3": {"qk_norm": "per_head", "qkv_bias": True},
    "gemma2": GEMMA2,
    "gpt2": {**GPT2, "tie_embeddings": True},
    "neox": {
        "norm": "layer_norm", "parallel_residual": True, "rotary_fraction": 0.5, "bias": True,
        "feed_forward": "gelu_exact",
    },
    "cohere": {
        "norm": "layer_norm", "parallel_residual": True, "shared_norm": True, "clip_qkv": 0.2,
    },
    "gates and sinks": {"attention_gate": "headwise", "attention_sinks": True, "qkv_bias": True},
    "ngpt": {"norm_placement": "normalized", "attention_gate": "elementwise"},
    "experts": {"moe": MOE},
    "shared expert": {"moe": MOE.replace(shared_expert_intermediate_size=20, dense_layers=())},
    "mostly padding": {"vocab_size": 20, "vocab_multiple": 64},
}  # fmt: skip


def config_of(**changes: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "vocab_multiple": 16, "d_model": 32, "num_layers": 2, "num_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 40, "max_sequence_length": SEQ + 3,
        "init_std": 0.1,
    }  # fmt: skip
    return TransformerConfig(**(settings | changes))


class Batch(NamedTuple):
    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None


def batch_of(config: TransformerConfig, *, seq: int = SEQ, documents: bool = True) -> Batch:
    """Rows with very different numbers of targets."""
    generator = torch.Generator().manual_seed(seq)
    ids = torch.randint(config.vocab_size, (ROWS, seq), generator=generator)
    kept = torch.rand(ROWS, seq, generator=generator) < torch.linspace(0.1, 0.9, ROWS)[:, None]
    borders = torch.rand(ROWS, seq, generator=generator) < 0.2
    document_ids = borders.cumsum(1) if documents else None
    return Batch(ids, shift_labels(ids, kept, document_ids), document_ids)


def model_of(
    config: TransformerConfig,
    *,
    freeze: tuple[str, ...] = (),
    lora: LoRAConfig | None = None,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """A model none of whose parameters is zero, or constant."""
    model = config.build(init_device="meta")
    if freeze or lora:
        choose_trained(model, freeze=freeze, lora=lora)
    model.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in canonical_parameters(model).items():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            is_norm = name.endswith("norm.weight") and not config.norm_weight_offset
            parameter.copy_(values + 1.0 if is_norm else values)
    return model


def train(model: Any, batch: Batch, z_loss_multiplier: float = 1e-2) -> Any:
    """Sums of two microbatches, whose gradients are left in the model."""
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        ids, labels, documents = (None if t is None else t[rows] for t in batch)
        sums = model(ids, labels, document_ids=documents, z_loss_multiplier=z_loss_multiplier)
        (sums.loss / (batch.labels != IGNORE_INDEX).sum()).backward()
        parts.append([sums.loss.detach(), sums.ce, sums.z, *(sums.router or ())])
    return [sum(values) for values in zip(*parts, strict=True)]


def part_of(whole: Tensor, spec: ShardSpec) -> Tensor:
    return whole if spec.dim is None else whole.narrow(spec.dim, spec.start, spec.length)


def complete_gradients(model: Any, shards: dict[str, ShardSpec], group: Any) -> dict[str, Tensor]:
    """Summands added up over the ranks that hold the same."""
    gradients = {n: p.grad for n, p in canonical_parameters(model).items() if p.grad is not None}
    for name, gradient in gradients.items():
        spec = shards[name]
        if "tp" in spec.partial_over:
            everywhere = torch.zeros(spec.shape, dtype=gradient.dtype)
            part_of(everywhere, spec).copy_(gradient)
            dist.all_reduce(everywhere, group=group)
            gradients[name] = part_of(everywhere, spec)
    return gradients


def compared(
    config: TransformerConfig,
    batch: Batch,
    group: Any,
    *,
    change: Callable[[Any], None] = lambda model: None,
    **options: Any,
) -> dict[str, float]:
    """Relative errors of sums, gradients, their norm and logits against this process alone."""
    whole = model_of(config, **options)
    model = copy.deepcopy(whole)
    shards = whole_specs(model)
    apply_tensor_parallel(model, group, shards)
    change(model)
    expected, got = train(whole, batch), train(model, batch)
    errors = {"sums": max(relative(a, b) for a, b in zip(got, expected, strict=True))}
    wanted = {n: p.grad for n, p in canonical_parameters(whole).items() if p.grad is not None}
    found = complete_gradients(model, shards, group)
    assert wanted.keys() == found.keys()
    norm = torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt()
    for name, gradient in found.items():
        reference = part_of(wanted[name], shards[name])
        # What has a gradient of zero has only rounding to compare with.
        size = reference.norm().clamp(min=1e-3 * norm)
        errors[name] = ((gradient - reference).norm() / size).item()
    own = sum(g.square().sum() / shards[n].copies for n, g in found.items())
    total = torch.as_tensor(own, dtype=norm.dtype)
    dist.all_reduce(total, group=group)
    errors["norm"] = relative(total.sqrt(), norm)
    with torch.no_grad():
        ids = batch.input_ids[:2]
        errors["logits"] = relative(model(ids), whole(ids))
    return errors


def relative(got: Tensor, expected: Tensor) -> float:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def worst(errors: dict[str, float]) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())


def in_group(job: Callable[..., Any], *args: Any) -> Any:
    """`job` with the group of all ranks."""
    env = open_environment(module_config("ddp"))
    try:
        return job(dist.group.WORLD, *args)
    finally:
        env.close()


def architectures(group: Any, names: tuple[str, ...]) -> dict[str, tuple[float, str]]:
    results = {}
    for name in names:
        config = config_of(**ARCHITECTURES[name])
        results[name] = worst(compared(config, batch_of(config), group))
    return results


@pytest.fixture(scope="module")
def on_two(workers: WorkerPool) -> list[dict[str, tuple[float, str]]]:
    return workers.run(2, in_group, architectures, tuple(ARCHITECTURES))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_ranks_compute_what_one_does(on_two: Any, name: str) -> None:
    assert max(errors[name] for errors in on_two) < (BOUND, "")


def shared_heads(group: Any) -> dict[str, tuple[float, str]]:
    names = ("llama", "olmo2", "olmo2, one key head", "layer norm of all heads", "ngpt", "experts")
    config = config_of(bias=True)
    lora = LoRAConfig(rank=3, dora=True, target_modules=("*.attention.*",), train_also=("*.key.*",))
    adapted = worst(compared(config, batch_of(config), group, lora=lora))
    return {**architectures(group, names), "adapters": adapted}


def test_ranks_share_heads_of_keys_that_are_fewer(workers: WorkerPool) -> None:
    for errors in workers.run(4, in_group, shared_heads):
        assert max(errors.values()) < (BOUND, "")


def lengths(group: Any) -> dict[str, tuple[float, str]]:
    """Rows that the ranks do not divide, up to the longest, with documents and without."""
    results = {}
    for name in ("llama", "gpt2", "gemma2", "experts"):
        config = config_of(**ARCHITECTURES[name])
        for seq, documents in ((config.max_sequence_length, True), (17, False), (1, False)):
            batch = batch_of(config, seq=seq, documents=documents)
            if seq == 1:
                batch = batch._replace(labels=batch.input_ids)
            results[f"{name} {seq}"] = worst(compared(config, batch, group))
    return results


def test_rows_of_any_length(workers: WorkerPool) -> None:
    for errors in workers.run(2, in_group, lengths):
        assert max(errors.values()) < (BOUND, "")


def alone(_: Any) -> dict[str, tuple[float, str]]:
    """In groups of one rank."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    results = {}
    for name in ("olmo2", "gpt2", "experts"):
        config = config_of(**ARCHITECTURES[name])
        results[name] = worst(compared(config, batch_of(config), groups[dist.get_rank()]))
    return results


def test_a_group_of_one_rank(workers: WorkerPool) -> None:
    for errors in workers.run(2, in_group, alone):
        assert max(errors.values()) < (BOUND, "")


def adapters(group: Any) -> dict[str, tuple[float, str]]:
    config = config_of(
        bias=True, moe=ARCHITECTURES["shared expert"]["moe"].replace(dense_layers=(0,))
    )
    everywhere = LoRAConfig(
        rank=3,
        alpha=5,
        target_modules=("*.attention.*", "blocks.0.feed_forward.*", "*.shared.*", "*.experts.*"),
        train_also=("*.attention_norm.*", "*.router.*"),
    )
    batch = batch_of(config)
    return {
        "adapters": worst(compared(config, batch, group, lora=everywhere)),
        "head alone": worst(compared(config, batch, group, freeze=("embed*", "blocks*", "*norm*"))),
        "all but the head": worst(compared(config, batch, group, freeze=("head.weight",))),
        "upper block": worst(compared(config, batch, group, freeze=("embed*", "blocks.0.*"))),
    }


def test_adapters_and_frozen_parameters(workers: WorkerPool) -> None:
    for errors in workers.run(2, in_group, adapters):
        assert max(errors.values()) < (BOUND, "")


def recompute(model: Any) -> None:
    apply_activation_checkpointing(model.blocks, ActivationCheckpointingConfig(mode="full"))


def compiled(model: Any) -> None:
    """With recomputation too. Raises where a graph breaks."""
    recompute(model)
    compile_model(model, fullgraph=True, backend="aot_eager")


def changed(group: Any) -> dict[str, tuple[float, str]]:
    moe = MOE.replace(dense_layers=())
    config = config_of(**ARCHITECTURES["olmo2"], moe=moe, logit_soft_cap=3.0, num_layers=1)
    batch = batch_of(config)
    return {
        "recomputed": worst(compared(config, batch, group, change=recompute)),
        "compiled": worst(compared(config, batch, group, change=compiled)),
    }


@pytest.mark.slow
def test_recomputed_and_compiled_without_a_graph_break(workers: WorkerPool) -> None:
    for errors in workers.run(2, in_group, changed):
        assert max(errors.values()) < (BOUND, "")


def initial_values(group: Any) -> list[str]:
    """Names of parameters that are not the whole model's."""
    wrong = []
    for name, changes in ARCHITECTURES.items():
        if name == "ngpt":  # its engine makes unit vectors of what is drawn
            continue
        config = config_of(**changes)
        whole, model = config.build(seed=3), config.build(init_device="meta")
        shards, inits = whole_specs(model), init_spec(model)
        apply_tensor_parallel(model, group, shards)
        own = share_of_model(config, group.size()).build(init_device="meta")
        computed = [[tuple(p.shape) for p in m.blocks.parameters()] for m in (model, own)]
        assert computed[0] == computed[1]
        model.to_empty(device="cpu")
        parameters = canonical_parameters(model)
        draw_initial_values(parameters, inits, shards, 3)
        expected = canonical_parameters(whole)
        assert parameters.keys() == expected.keys() == shards.keys()
        wrong += [
            f"{name}: {key}"
            for key, parameter in parameters.items()
            if not torch.equal(parameter, part_of(expected[key], shards[key]))
        ]
    return wrong


def test_initial_values_are_those_of_one_process(workers: WorkerPool) -> None:
    assert workers.run(4, in_group, initial_values) == [[]] * 4


def stages(group: Any, tied: bool) -> tuple[float, str]:
    """Two stages of a pipeline, on each rank one after the other, of rows that do not divide."""
    config = config_of(tie_embeddings=tied, moe=MOE, positions="learned")
    batch = batch_of(config, seq=17)
    whole = model_of(config)
    expected = train(whole, batch)
    parts = [copy.deepcopy(whole) for _ in range(2)]
    specs = []
    for layer, part in enumerate(parts):
        part.zero_grad()
        part.keep_layers(range(layer, layer + 1))
        specs.append(whole_specs(part))
        apply_tensor_parallel(part, group, specs[-1])
    labels, count = batch.labels, (batch.labels != IGNORE_INDEX).sum()
    x, router = parts[0](batch.input_ids, labels, document_ids=batch.document_ids)
    assert x.shape == (ROWS, 9, config.d_model)
    assert router is None  # layer 0 is dense
    sums = parts[1](x, labels, document_ids=batch.document_ids, z_loss_multiplier=1e-2)
    (sums.loss / count).backward()
    errors = {"loss": relative(sums.loss.detach(), expected[0])}
    gradients: dict[str, Tensor] = {}
    for part, shards in zip(parts, specs, strict=True):
        for name, gradient in complete_gradients(part, shards, group).items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    shards = specs[0] | specs[1]
    for name, parameter in canonical_parameters(whole).items():
        errors[name] = relative(gradients[name], part_of(parameter.grad, shards[name]))
    return worst(errors)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_of_a_pipeline(workers: WorkerPool, tied: bool) -> None:
    assert max(workers.run(2, in_group, stages, tied)) < (BOUND, "")


def routed_by_position(group: Any) -> tuple[float, str]:
    """Experts that somebody else has sharded: here each rank has all of them."""
    config = config_of(**ARCHITECTURES["shared expert"])
    batch = batch_of(config, seq=17)
    whole = model_of(config)
    model, shards = copy.deepcopy(whole), whole_specs(whole)
    experts = {name: spec for name, spec in shards.items() if ".experts." in name}
    apply_tensor_parallel(model, group, shards, experts_are_sharded=True)
    assert {name: shards[name] for name in experts} == experts
    shards |= {name: spec._replace(partial_over=("tp",)) for name, spec in experts.items()}
    errors = {
        f"sum {index}": relative(a, b)
        for index, (a, b) in enumerate(zip(train(model, batch), train(whole, batch), strict=True))
    }
    wanted = canonical_parameters(whole)
    for name, gradient in complete_gradients(model, shards, group).items():
        errors[name] = relative(gradient, part_of(wanted[name].grad, shards[name]))
    return worst(errors)


def test_each_rank_routes_its_own_tokens_to_experts_that_are_sharded(workers: WorkerPool) -> None:
    assert max(workers.run(2, in_group, routed_by_position)) < (BOUND, "")


def traffic(group: Any) -> Counter[tuple[str, str]]:
    """Collectives of one forward and backward in bf16, by kind and type."""
    config = config_of(**ARCHITECTURES["olmo2"])
    model: Any = model_of(config, dtype=torch.bfloat16)
    batch = batch_of(config)
    expected = copy.deepcopy(model)(*batch[:2], document_ids=batch.document_ids)
    apply_tensor_parallel(model, group, whole_specs(model))
    seen: Counter[tuple[str, str]] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "c10d":
                seen[func._opname, str(tree_leaves(args)[0].dtype)] += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        sums = model(*batch[:2], document_ids=batch.document_ids)
        sums.loss.backward()
    assert sums.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    return seen


def test_rows_travel_in_the_compute_type_and_no_oftener_than_they_must(workers: WorkerPool) -> None:
    layers, norms = 2, 2
    around = 2 * layers + 1  # attention and feed-forward of each layer, and an end of the model
    expected = {
        ("_allgather_base_", "torch.bfloat16"): 2 * around,  # forward and backward
        ("_reduce_scatter_base_", "torch.bfloat16"): 2 * around,
        ("allreduce_", "torch.float32"): 2 * layers * norms,
        ("_allgather_base_", "torch.float32"): 1,  # the loss, which is of one chunk
    }
    assert workers.run(2, in_group, traffic) == [expected] * 2
