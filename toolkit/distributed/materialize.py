"""From a model on the meta device to an engine: parallelism in one visible order.

    stages -> expert, tensor, context parallelism -> float8, or a base in few bits
    -> activation checkpointing, offload -> compile -> shard -> storage -> initial values
    -> optimizer

Where exchanges between ranks, or copies to the host, break the graph of a block it is compiled
before it is checkpointed.

Initial values depend on (seed, parameter name, shape) only, so every engine starts from the same
numbers; each rank draws just the slices it keeps. A model that has storage keeps its values.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from toolkit.config.named import named
from toolkit.distributed.accelerator import deepspeed_settings, init_deepspeed
from toolkit.distributed.activations import (
    apply_activation_checkpointing,
    apply_offload,
    set_memory_budget,
)
from toolkit.distributed.config import ActivationCheckpointingConfig, Float8Config
from toolkit.distributed.context_parallel import apply_context_parallel
from toolkit.distributed.deepspeed_engine import DeepSpeedEngine
from toolkit.distributed.devices import compute_dtype
from toolkit.distributed.engine import BuildOptimizer, Engine
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.expert_parallel import apply_expert_parallel
from toolkit.distributed.float8 import apply_float8, gathers_float8, scales_of
from toolkit.distributed.pipeline import plan_pipeline
from toolkit.distributed.process_groups import set_collective_timeouts
from toolkit.distributed.shards import ShardSpec, draw_initial_values, whole_specs
from toolkit.distributed.sizes import (
    Besides,
    breaks_in_blocks,
    check_combination,
    sharded_dimension,
)
from toolkit.distributed.stages import Stages
from toolkit.distributed.tensor_parallel import apply_tensor_parallel
from toolkit.distributed.torch_engine import TorchEngine
from toolkit.models import compile as compiling
from toolkit.models.init import InitSpec, canonical_parameters, init_spec
from toolkit.models.parameters import QuantisedLayers
from toolkit.models.quantised import quantise_layers, quantised_linears
from toolkit.models.transformer import Transformer


def prepare_engine(
    environment: TrainingEnvironment,
    model: nn.Module,
    build_optimizer: BuildOptimizer,
    *,
    max_grad_norm: float | None,
    ac_config: ActivationCheckpointingConfig | None = None,
    compile_model: bool = False,
    float8_config: Float8Config | None = None,
    activation_offload: bool = False,
    quantised: QuantisedLayers | None = None,
    width_multiplier: float = 1.0,
) -> Engine:
    """Materialise `model` and hand it to the engine of the layout, with its optimizer.

    `build_optimizer` gets trainable and frozen parameters by canonical name; `width_multiplier`:
    see `init_spec`.
    """
    layout = environment.layout
    if layout.pp_config is not None:
        pipeline = plan_pipeline(model.config, layout.pp_config)  # type: ignore[arg-type]
        model = Stages(model, pipeline, layout.place(environment.rank)["pp"])  # type: ignore[arg-type]
    shards = materialize(
        model,
        environment,
        ac_config=ac_config,
        compile_model=compile_model,
        float8_config=float8_config,
        activation_offload=activation_offload,
        quantised=quantised,
        width_multiplier=width_multiplier,
    )
    engine: Engine
    if isinstance(model, Stages):
        # torch's schedules take a second to import.
        pipeline_engine = named("toolkit.distributed.pipeline_engine:PipelineEngine")
        engine = pipeline_engine(
            environment,
            model,
            shards,
            build_optimizer,
            recomputes=ac_config is not None,
        )
    elif environment.layout.zero_stage:
        engine = DeepSpeedEngine(
            environment, model, shards, build_optimizer, max_grad_norm=max_grad_norm
        )
    else:
        engine = TorchEngine(environment, model, shards, build_optimizer)
        if gathers_float8(model):
            engine.weights_changed = scales_of(model)  # type: ignore[method-assign]
    for axes in (("dp_replicate", "dp_shard"), ("dp_replicate",)):
        environment.group(*axes)  # opened before time-outs are set
    set_collective_timeouts(environment.timeout)
    return engine


def materialize(
    model: nn.Module,
    environment: TrainingEnvironment,
    *,
    ac_config: ActivationCheckpointingConfig | None = None,
    compile_model: bool = False,
    float8_config: Float8Config | None = None,
    activation_offload: bool = False,
    quantised: QuantisedLayers | None = None,
    width_multiplier: float = 1.0,
) -> dict[str, ShardSpec]:
    """Shard `model` in place, give it storage and initial values; what this rank holds of each
    parameter."""
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    inits = init_spec(model, width_multiplier) if is_meta else {}
    layout = environment.layout
    selects = ac_config is not None and ac_config.mode == "selected_ops"
    # Of a script nothing has been checked yet.
    asked = Besides(
        quantize_base=None if quantised is None else quantised.kind,
        compiles_selected_ops=compile_model and selects,
    )
    check_combination(layout, asked)
    shards = model.shards if isinstance(model, Stages) else whole_specs(model)
    parts: list[Any] = model.modules_in_order() if isinstance(model, Stages) else [model]
    has_breaks = activation_offload or bool(breaks_in_blocks(layout))
    set_memory_budget(ac_config)
    for part in parts:
        _cut(part, environment, shards)
        if float8_config is not None:
            device, precision = environment.device, layout.precision
            apply_float8(part, float8_config, device=device, precision=precision)
        if quantised is not None:
            quantise_layers(part, quantised)
        if compile_model and has_breaks:
            compiling.compile_model(part, inside_checkpoints=True)
        if ac_config is not None:
            apply_activation_checkpointing(part.blocks, ac_config)
        if activation_offload:
            apply_offload(part.blocks)
        if compile_model and not has_breaks:
            compiling.compile_model(part)
    if compile_model:
        # Blocks are compiled one by one. DDP's own splitting would cut each of them again, where
        # a bucket of gradients ends.
        torch._dynamo.config.optimize_ddp = False
    if layout.zero_stage == 3:
        _partition(model, environment, inits, shards)
        return shards
    device = torch.device("cpu") if layout.dp_config.cpu_offload else environment.device
    if not is_meta:
        model.to(device)
    for part in parts if layout.is_fsdp else ():
        _fully_shard(part, environment)
    if is_meta:
        model.to_empty(device=device)
        draw_initial_values(canonical_parameters(model), inits, shards, environment.seed)
        for name, layer in quantised_linears(model).items():  # whole ones, one at a time
            weight = torch.empty(layer.shape, device=device)
            draw_initial_values({name: weight}, inits, shards, environment.seed)
            layer.fill_(weight)
    return shards


def _cut(model: nn.Module, environment: TrainingEnvironment, shards: dict[str, ShardSpec]) -> None:
    """Let the ranks of each group share what is theirs to share."""
    layout = environment.layout
    if layout.ep > 1:
        apply_expert_parallel(model, environment.expert_mesh.get_group("ep"), shards)
    if (group := environment.group("tp")) is not None:
        assert isinstance(model, Transformer)
        apply_tensor_parallel(model, group, shards, experts_are_sharded=layout.ep > 1)
    if (group := environment.group("cp")) is not None:
        config = layout.cp_config
        assert config is not None, "its style decides"
        apply_context_parallel(
            model,
            group,
            style=config.style,
            load_balance=config.load_balance,
            multiple_of=layout.tp,
        )


def _fully_shard(model: nn.Module, environment: TrainingEnvironment) -> None:
    """FSDP2 over the ranks that share the weights; experts that lie on several ranks, over those
    that share the same ones."""
    layout, settings = environment.layout, environment.layout.dp_config
    blocks: Any = model.blocks
    mesh = expert_mesh = environment.fsdp_mesh
    experts: list[Any] = []
    if layout.ep > 1:
        axes = ("dp_replicate", "efsdp") if layout.dp_replicate > 1 else ("efsdp",)
        expert_mesh = environment.expert_mesh[axes]
        experts = [block.feed_forward.experts for block in blocks if block.has_experts]
    for module in model.modules():
        ranks = (expert_mesh if module in experts else mesh).size(-1)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if sharded_dimension(parameter.shape, ranks) is None:
                flat = nn.Parameter(parameter.detach().flatten(0, 1), parameter.requires_grad)
                setattr(module, key, flat)
    shared: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype(layout.precision),
            reduce_dtype=getattr(torch, settings.reduce_dtype),
            output_dtype=None,
            cast_forward_inputs=False,
        ),
    }
    if settings.cpu_offload:
        shared["offload_policy"] = CPUOffloadPolicy(pin_memory=environment.device.type == "cuda")
    # torch's stages keep gathered weights from the first backward to the end of a step: to free
    # them after a forward would only gather them again for the next microbatch.
    reshards = settings.reshard_after_forward and layout.pp == 1

    def shard(module: Any, over: DeviceMesh, *, reshard: bool) -> Any:
        def place(parameter: nn.Parameter) -> Shard:
            return Shard(sharded_dimension(parameter.shape, over.size(-1)) or 0)

        return fully_shard(
            module,
            mesh=over,
            reshard_after_forward=reshard,
            shard_placement_fn=place,
            **shared,
        )

    units: list[Any] = []
    for block in blocks:
        parts: list[Any] = [block]
        if settings.wrapping_strategy == "fine_grained":
            parts += [block.attention, block.feed_forward]
        if experts and block.has_experts:
            parts.append(block.feed_forward.experts)
        for part in reversed(parts):  # inner ones first
            over = expert_mesh if part in experts else mesh
            shard(part, over, reshard=reshards)
        units += parts
    if settings.wrapping_strategy != "blocks" and model.head is not None:
        units.append(shard(model.head, mesh, reshard=False))
    # The root holds embedding and head, which the forward needs first and last: never resharded
    # in between.
    root = shard(model, mesh, reshard=False)
    # What torch has as defaults, but may change: gradients are reduced every microbatch.
    root.set_requires_gradient_sync(True)
    root.set_requires_all_reduce(True)
    root.set_reshard_after_backward(True)
    for unit in (*units, root):
        # As a mean, which the collective takes where it can; or as a sum, where meshes of different
        # sizes would take different means. (A factor other than 1 is no way to the same: torch 2.13
        # divides by it twice in a group of one rank, and gloo has no such operation in fp32.)
        unit.set_force_sum_reduction_for_comms(layout.sums_gradients)
        if layout.sums_gradients:
            unit.set_gradient_divide_factor(1.0)
    ahead = settings.prefetch_factor
    for index, unit in enumerate(units if ahead else ()):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + ahead])
        unit.set_modules_to_backward_prefetch(units[max(0, index - ahead) : index][::-1])


def _partition(
    model: nn.Module,
    environment: TrainingEnvironment,
    inits: Mapping[str, InitSpec],
    shards: Mapping[str, ShardSpec],
) -> None:
    """ZeRO-3: give each module storage and values in turn, and let DeepSpeed partition it at once,
    so that no rank holds more than one module's parameters whole."""
    init_deepspeed(environment)
    import deepspeed

    settings = deepspeed_settings(environment, None)
    names = {id(parameter): name for name, parameter in canonical_parameters(model).items()}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            visit(child)
        keys = {key: names[id(p)] for key, p in module.named_parameters(recurse=False)}
        if not keys:
            return
        if inits:
            module.to_empty(device=environment.device, recurse=False)
            own = {name: getattr(module, key) for key, name in keys.items()}
            draw_initial_values(own, inits, shards, environment.seed)
        deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=torch.float32)

    visit(model)
