"""From a model on the meta device to parameters on devices: parallelism in one visible order.

    activation checkpointing -> compile -> shard -> storage -> initial values

Initial values depend on (seed, parameter name, shape) only, so every engine starts from the same
numbers; each rank draws just the slices it keeps. A model that has storage keeps its values.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from toolkit.distributed.accelerator import deepspeed_settings, fsdp_mesh, init_deepspeed
from toolkit.distributed.activation_checkpointing import apply_activation_checkpointing
from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.models.init import (
    InitSpec,
    canonical_name,
    canonical_parameters,
    fill_flat_,
    init_spec,
)

LARGEST_SHARE = 1.1
"""Most that a rank may hold of stacked matrices, as a multiple of an even share."""


def materialize(
    model: nn.Module,
    environment: TrainingEnvironment,
    *,
    ac_config: ActivationCheckpointingConfig | None = None,
    compile_model: bool = False,
) -> nn.Module:
    """Shard `model` for the engine, give it storage and initial values; changed in place."""
    specs = init_spec(model) if _on_meta(model) else {}
    if ac_config is not None:
        apply_activation_checkpointing(model.blocks, ac_config)  # type: ignore[arg-type]
    if compile_model:
        from toolkit.models.compile import compile_model as compile_parts

        compile_parts(model)
        # Blocks are compiled one by one. DDP's own splitting would cut each of them again, where
        # a bucket of gradients ends.
        torch._dynamo.config.optimize_ddp = False
    layout = environment.layout
    if layout.zero_stage == 3:
        _partition(model, environment, specs)
        return model
    device = torch.device("cpu") if layout.dp_config.cpu_offload else environment.device
    if layout.is_fsdp:
        if not specs:
            model.to(device)
        _shard(model, environment)
    if specs:
        model.to_empty(device=device)
        _initialize(model, specs, environment.seed)
    else:
        model.to(device)
    return model


def local_runs(parameter: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """This rank's elements of a parameter: contiguous runs of the flattened whole, each with the
    place where it starts there.

    One run where FSDP2 shards dimension 0; else one for each index before the sharded dimension.
    """
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(parameter, DTensor):
        yield parameter.view(-1), 0
        return
    local: torch.Tensor = parameter.to_local()
    if not local.numel():
        return
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    dims = [place.dim for place in parameter.placements if type(place) is Shard]
    assert len(dims) == 1, f"initial values of {parameter.placements} cannot be drawn yet"
    dim = dims[0]
    inner = parameter.shape[dim + 1 :].numel()
    for index, run in enumerate(local.view(parameter.shape[:dim].numel(), -1)):
        yield run, (index * parameter.shape[dim] + offset[dim]) * inner


def sharded_dimension(shape: torch.Size, ranks: int) -> int | None:
    """Along which dimension FSDP shards a parameter; None: along its first two, flattened.

    Stacked matrices of experts go to ranks whole, as every parameter goes by rows. Where that
    leaves some rank more than `LARGEST_SHARE` times its share (more ranks than experts: some have
    none), it is the first dimension that ranks divide: FSDP2 shards only dimension 0 unevenly.
    """
    if len(shape) < 3 or -(-shape[0] // ranks) * ranks <= LARGEST_SHARE * shape[0]:
        return 0
    return next((d for d in range(1, len(shape)) if shape[d] % ranks == 0), None)


def _flatten_stacks(model: nn.Module, ranks: int) -> None:
    """Stacked matrices of which ranks divide no dimension become one long matrix each."""
    for module in model.modules():
        shapes: Any = {}
        for key, parameter in list(module.named_parameters(recurse=False)):
            if sharded_dimension(parameter.shape, ranks) is None:
                shapes[key] = parameter.shape
                flat = nn.Parameter(parameter.detach().flatten(0, 1), parameter.requires_grad)
                setattr(module, key, flat)
        if shapes:
            module.flattened_from = shapes


def flattened_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Canonical name -> whole shape, of the parameters that `_flatten_stacks` has flattened."""
    return {
        canonical_name(f"{name}.{key}"): shape
        for name, module in model.named_modules()
        for key, shape in getattr(module, "flattened_from", {}).items()
    }


def _shard(model: nn.Module, environment: TrainingEnvironment) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    layout, settings = environment.layout, environment.layout.dp_config
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if layout.precision == "bf16" else None,
        reduce_dtype=dtypes[settings.reduce_dtype],
        output_dtype=None,
        cast_forward_inputs=False,
    )
    options: dict = {"mesh": fsdp_mesh(environment), "mp_policy": policy}
    ranks = options["mesh"]["dp_shard"].size()
    _flatten_stacks(model, ranks)
    options["shard_placement_fn"] = lambda p: Shard(sharded_dimension(p.shape, ranks) or 0)
    if settings.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=environment.device.type == "cuda")
    units: list[Any] = []
    blocks: Any = model.blocks
    for block in blocks:
        parts: list[Any] = [block]
        if settings.wrapping_strategy == "fine_grained":
            parts += [block.attention, block.feed_forward]
        for part in reversed(parts):  # inner ones first
            fully_shard(part, reshard_after_forward=settings.reshard_after_forward, **options)
        units += parts
    if settings.wrapping_strategy != "blocks":
        head: Any = model.head
        units.append(fully_shard(head, reshard_after_forward=False, **options))
    # The root holds embedding and head, which the forward needs first and last: never resharded
    # in between.
    fully_shard(model, reshard_after_forward=False, **options)
    # What torch has as defaults, but may change: gradients are reduced every microbatch, as a mean
    # that the collective takes where it can.
    model.set_requires_gradient_sync(True)  # type: ignore[operator]
    model.set_requires_all_reduce(True)  # type: ignore[operator]
    model.set_reshard_after_backward(True)  # type: ignore[operator]
    for unit in (*units, model):
        unit.set_force_sum_reduction_for_comms(False)
    _prefetch(units, settings.prefetch_factor)


def _prefetch(units: list[Any], number: int) -> None:
    """Let each unit, when it is computed, start to gather the next `number` of them."""
    if not number:
        return
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + number])
        unit.set_modules_to_backward_prefetch(units[max(0, index - number) : index][::-1])


def _initialize(model: nn.Module, specs: dict[str, InitSpec], seed: int) -> None:
    for name, parameter in canonical_parameters(model).items():
        with torch.no_grad():
            for run, start in local_runs(parameter):
                fill_flat_(
                    run,
                    name=name,
                    numel=parameter.numel(),
                    start=start,
                    spec=specs[name],
                    seed=seed,
                )


def _partition(
    model: nn.Module, environment: TrainingEnvironment, specs: dict[str, InitSpec]
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
        own = dict(module.named_parameters(recurse=False))
        if not own:
            return
        if specs:
            keys = {key: names[id(parameter)] for key, parameter in own.items()}
            module.to_empty(device=environment.device, recurse=False)
            for key, parameter in module.named_parameters(recurse=False):
                with torch.no_grad():
                    fill_flat_(
                        parameter.view(-1),
                        name=keys[key],
                        numel=parameter.numel(),
                        start=0,
                        spec=specs[keys[key]],
                        seed=environment.seed,
                    )
        deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=torch.float32)

    visit(model)


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())
