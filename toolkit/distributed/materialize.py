"""From a model on the meta device to parameters on devices: parallelism in one visible order.

    activation checkpointing -> compile -> shard -> storage -> initial values

Initial values depend on (seed, parameter name, shape) only, so every engine starts from the same
numbers; each rank draws just the slices it keeps. A model that has storage keeps its values.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.distributed.accelerator import deepspeed_settings, fsdp_mesh, init_deepspeed
from toolkit.distributed.activation_checkpointing import apply_activation_checkpointing
from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.models.init import InitSpec, canonical_parameters, fill_flat_, init_spec

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


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

        compile_parts(model)  # type: ignore[arg-type]
    engine = environment.engine
    if engine.zero_stage == 3:
        _partition(model, environment, specs)
        return model
    device = torch.device("cpu") if engine.cpu_offload and engine.is_fsdp else environment.device
    if engine.is_fsdp:
        if not specs:
            model.to(device)
        _shard(model, environment)
    if specs:
        model.to_empty(device=device)
        _initialize(model, specs, environment.seed)
    else:
        model.to(device)
    return model


def local_range(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's slice of a parameter and where it starts in the flattened whole.

    FSDP2 shards dimension 0, so a local shard is one contiguous range of the row-major whole.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter, 0
    local = parameter.to_local()
    first_row = _first_row(parameter)
    return local, first_row * parameter.shape[1:].numel()


def _first_row(parameter: "DTensor") -> int:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return offset[0] if offset else 0


def _shard(model: nn.Module, environment: TrainingEnvironment) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    engine = environment.engine
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if engine.precision == "bf16" else None,
        reduce_dtype=dtypes[engine.reduce_dtype],
        cast_forward_inputs=False,
    )
    options: dict = {"mesh": fsdp_mesh(environment), "mp_policy": policy}
    if engine.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=environment.device.type == "cuda")
    units = []
    for block in model.blocks:  # type: ignore[union-attr]
        parts = [block]
        if engine.wrapping_strategy == "fine_grained":
            parts += [block.attention, block.feed_forward]
        for part in reversed(parts):  # inner ones first
            fully_shard(part, reshard_after_forward=engine.reshard_after_forward, **options)
        units += parts
    if engine.wrapping_strategy != "blocks":
        head: Any = model.head
        units.append(fully_shard(head, reshard_after_forward=False, **options))
    # The root holds embedding and head, which the forward needs first and last: never resharded
    # in between.
    fully_shard(model, reshard_after_forward=False, **options)
    _prefetch(units, engine.prefetch_factor)


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
            local, start = local_range(parameter)
            fill_flat_(
                local.view(-1),
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
