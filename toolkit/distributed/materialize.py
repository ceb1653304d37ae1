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
from toolkit.distributed.fully_sharded import shard_fully
from toolkit.distributed.pipeline import plan_pipeline
from toolkit.distributed.process_groups import set_collective_timeouts
from toolkit.distributed.shards import ShardSpec, draw_initial_values, whole_specs
from toolkit.distributed.sizes import (
    Besides,
    breaks_in_blocks,
    check_combination,
    check_mtp,
)
from toolkit.distributed.stages import Stages
from toolkit.distributed.tensor_parallel import apply_tensor_parallel
from toolkit.distributed.torch_engine import TorchEngine
from toolkit.models import compile as compiling
from toolkit.models.architecture import CompileMode
from toolkit.models.delta_net import breaks_graphs
from toolkit.models.init import (
    InitSpec,
    canonical_parameters,
    init_spec,
    initialize_buffers_,
)
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
    compile_mode: CompileMode = "default",
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
    check_mtp(layout, len(getattr(model, "mtp", ())))
    if layout.pp_config is not None:
        pipeline = plan_pipeline(model.config, layout.pp_config)  # type: ignore[arg-type]
        model = Stages(model, pipeline, layout.place(environment.rank)["pp"])  # type: ignore[arg-type]
    shards = materialize(
        model,
        environment,
        ac_config=ac_config,
        compile_model=compile_model,
        compile_mode=compile_mode,
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
    compile_mode: CompileMode = "default",
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
        compile_mode=compile_mode,
    )
    check_combination(layout, asked)
    shards = model.shards if isinstance(model, Stages) else whole_specs(model)
    parts: list[Any] = model.modules_in_order() if isinstance(model, Stages) else [model]
    has_breaks = activation_offload or bool(breaks_in_blocks(layout))
    has_breaks |= breaks_graphs(model, environment.device, compute_dtype(layout.precision))
    set_memory_budget(ac_config)
    for part in parts:
        _cut(part, environment, shards)
        if float8_config is not None:
            device, precision = environment.device, layout.precision
            apply_float8(part, float8_config, device=device, precision=precision)
        if quantised is not None:
            quantise_layers(part, quantised)
        if compile_model and has_breaks:
            compiling.compile_model(part, inside_checkpoints=True, mode=compile_mode)
        if ac_config is not None:
            apply_activation_checkpointing(part.all_blocks, ac_config)
        if activation_offload:
            apply_offload(part.all_blocks)
        if compile_model and not has_breaks:
            compiling.compile_model(part, mode=compile_mode)
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
        shard_fully(part, environment)
    if is_meta:
        model.to_empty(device=device)
        initialize_buffers_(model)
        draw_initial_values(canonical_parameters(model), inits, shards, environment.seed)
        for name, layer in quantised_linears(model).items():  # whole ones, one at a time
            weight = torch.empty(layer.shape, device=device)
            draw_initial_values({name: weight}, inits, shards, environment.seed)
            layer.fill_(weight)
    return shards


def materialize_frozen(model: nn.Module, environment: TrainingEnvironment) -> dict[str, ShardSpec]:
    """`materialize` for a model on the meta device that nobody trains, whose weights are loaded
    next: it is cut like one that is trained, and by FSDP2, but not over ZeRO's ranks or stages."""
    shards, layout = whole_specs(model), environment.layout
    _cut(model, environment, shards)
    device = environment.device
    if layout.is_fsdp:
        shard_fully(model, environment)
        device = torch.device("cpu") if layout.dp_config.cpu_offload else device
    model.to_empty(device=device)
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
            initialize_buffers_(module)
            own = {name: getattr(module, key) for key, name in keys.items()}
            draw_initial_values(own, inits, shards, environment.seed)
        deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=torch.float32)

    visit(model)
