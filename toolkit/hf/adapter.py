"""Low-rank adapters out: merged into the base weights, or in PEFT's own format.

An adapter sits on one of our linear layers. A family that keeps several of them in one tensor
(GPT-2's c_attn, Phi-3's qkv_proj) gets one adapter on that tensor's layer instead: the n parts'
A lie below one another, (n * rank, in), and each part's B fills its own rows and its own columns
of the fused B, (all rows, n * rank), whose rows then go where the family's transform puts those of
the weights. PEFT's `rank_pattern` and `alpha_pattern` keep alpha / rank as it was.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.hf.family import Family, Rule
from toolkit.models.config import LoRAConfig, ModelConfig
from toolkit.models.parameters import parameter_shapes
from toolkit.storage.atomic import PathLike, new_output, write_json_atomic

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
"""Of every tensor in PEFT's files."""


def merged(
    base: Iterable[tuple[str, Tensor]], adapter: Mapping[str, Tensor], lora: LoRAConfig
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model that base and adapter are together, (our name, whole tensor), one at
    a time in the order of `base`: W + alpha / rank * B A in fp32 (fp64 where W is) for adapted
    weights, the rest as it came.

    `adapter` holds `<layer>.lora_A.weight`, `<layer>.lora_B.weight` of every adapted layer and,
    whole, the parameters trained besides (`train_also`), which take the place of the base's. Raises
    CheckpointError: a tensor of the adapter belongs to none of the base's, or has another shape."""
    unused = set(adapter)
    for name, tensor in base:
        layer = name.removesuffix(".weight")
        down, up = adapter.get(layer + A_SUFFIX), adapter.get(layer + B_SUFFIX)
        if name in adapter:
            _check_shape(name, adapter[name].shape, tensor.shape)
            tensor = adapter[name]
        elif down is not None and up is not None:
            _check_shape(name, torch.Size([up.shape[0], down.shape[1]]), tensor.shape)
            wide = torch.promote_types(tensor.dtype, torch.float32)
            delta = up.detach().to("cpu", wide) @ down.detach().to("cpu", wide)
            tensor = tensor.detach().to("cpu", wide).add(delta, alpha=lora.alpha / lora.rank)
        yield name, tensor
        unused -= {name, layer + A_SUFFIX, layer + B_SUFFIX}
    if unused:
        raise CheckpointError(f"{min(unused)}: the base has no weight for it; it is another model")


def export_adapter(
    config: ModelConfig,
    family: Family,
    lora: LoRAConfig,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: PathLike,
    base_name: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as `PeftModel.from_pretrained` reads
    them onto the family's own model. Raises CheckpointError where parameters were trained besides,
    which an adapter cannot hold, a layer of the adapter has no counterpart in the family, or the
    folder is in use.

    Args:
        tensors: the adapter's, by our names, whole, on any device.
        folder: must not exist, or be empty.
        base_name: name or path of the `transformers` model that it belongs to.
        dtype: of the tensors on disk; default: float32.
    """
    from safetensors.torch import save_file

    own = dict(tensors.items() if isinstance(tensors, Mapping) else tensors)
    if whole := [name for name in own if not name.endswith((A_SUFFIX, B_SUFFIX))]:
        raise CheckpointError(
            f"{whole[0]}: trained whole (train_module.lora.train_also), which an adapter cannot "
            "hold; export the merged model instead: toolkit export-hf --merge-adapter"
        )
    transformer = config.to_transformer()
    rows = {name: shape[0] for name, shape in parameter_shapes(transformer).items()}
    modules = _their_modules(family.rules(transformer), own, rows)
    weights = {
        f"{_PREFIX}{module.name}{suffix}": tensor.to(dtype or torch.float32).contiguous()
        for module in modules
        for suffix, tensor in ((A_SUFFIX, module.down), (B_SUFFIX, module.up))
    }
    settings = _peft_config(modules, lora, base_name)
    with new_output(folder) as unfinished:
        save_file(weights, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json_atomic(unfinished / CONFIG_FILE, settings, sync=False)


class _TheirModule(NamedTuple):
    name: str
    down: Tensor
    """A, `(rank, in)`."""
    up: Tensor
    """B, `(out, rank)`."""
    is_transposed: bool
    """The layer keeps its weight as `(in, out)`."""


def _their_modules(
    rules: list[Rule], own: dict[str, Tensor], rows: dict[str, int]
) -> list[_TheirModule]:
    """Adapters on linear layers of the family; `rows`: of each of our weights."""
    unused = {name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX) for name in own}
    modules = []
    for rule in rules:
        layers = [name.removesuffix(".weight") for name in rule.ours]
        adapted = [layer for layer in layers if layer in unused]
        if not adapted or len(rule.theirs) != 1 or not rule.theirs[0].endswith(".weight"):
            continue
        unused -= set(adapted)
        downs = [_cpu(own, layer + A_SUFFIX) for layer in adapted]
        ups = {layer: _cpu(own, layer + B_SUFFIX) for layer in adapted}
        blocks, column, rank = [], 0, sum(up.shape[1] for up in ups.values())
        for name, layer in zip(rule.ours, layers, strict=True):
            block = torch.zeros(rows[name], rank)
            if layer in ups:
                end = column + ups[layer].shape[1]
                block[:, column:end] = ups[layer]
                column = end
            blocks.append(block)
        fused = rule.transform.join(blocks)[0]
        name = rule.theirs[0].removesuffix(".weight")
        modules.append(_TheirModule(name, torch.cat(downs), fused, rule.transform.transposed))
    if unused:
        raise CheckpointError(
            f"{min(unused)}: the transformers class has no linear layer for this adapter; export "
            "the merged model instead: toolkit export-hf --merge-adapter"
        )
    return modules


def _peft_config(
    modules: list[_TheirModule], lora: LoRAConfig, base_name: str | None
) -> dict[str, Any]:
    from peft import LoraConfig, TaskType

    ranks = {m.name: m.down.shape[0] for m in modules if m.down.shape[0] != lora.rank}
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    settings = LoraConfig(
        base_model_name_or_path=base_name,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        r=lora.rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # a fraction serves as well
        lora_dropout=0.0,
        target_modules=[module.name for module in modules],
        rank_pattern=ranks,
        alpha_pattern={name: alpha * (rank // lora.rank) for name, rank in ranks.items()},
        fan_in_fan_out=any(module.is_transposed for module in modules),
    ).to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}


def _cpu(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name}: missing from the adapter")
    return tensors[name].detach().to("cpu", torch.float32)


def _check_shape(name: str, own: torch.Size, base: torch.Size) -> None:
    if own != base:
        raise CheckpointError(
            f"{name}: the adapter is for shape {tuple(own)}, the base has {tuple(base)}; it is "
            "another model"
        )
