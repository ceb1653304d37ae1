"""Adapters out: merged into the base weights, or in PEFT's own format.

An adapter sits on one of our linear layers. A family that keeps several of them in one tensor
(GPT-2's c_attn, Phi-3's qkv_proj) gets one adapter on that tensor's layer instead: the n parts'
A lie below one another, (n * rank, in), and each part's B fills its own rows and its own columns
of the fused B, (all rows, n * rank), whose rows then go where the family's transform puts those of
the weights. PEFT's `rank_pattern` and `alpha_pattern` keep the scaling as it was.

Adapters of experts are written expert by expert, as layers were before transformers 5, which PEFT
stacks for the models of transformers 5.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.hf.family import STACKED, Family, Rule
from toolkit.models.config import ModelConfig, TransformerConfig
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import TOKENS, is_adapter, parameter_shapes
from toolkit.models.shapes import HEAD, SCORE
from toolkit.storage.atomic import PathLike, new_output, write_json_atomic

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
MAGNITUDE, ROWS = ".lora_magnitude", ".token_rows.weight"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
"""Of every tensor in PEFT's files."""
_TOKENS = ".token_adapter.trainable_tokens_delta"
_TOKENS_ALONE = ".trainable_tokens_delta"
"""Of tokens, beside low-rank adapters and without."""


class NotForPeftError(CheckpointError):
    """An adapter of which PEFT has no place for a part."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem}; export the merged model instead: toolkit export-hf --merge-adapter"
        )


def merged(
    base: Iterable[tuple[str, Tensor]], adapter: Mapping[str, Tensor], lora: LoRAConfig
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model that base and adapter are together, (our name, whole tensor), one at
    a time in the order of `base`: computed in fp64 and rounded to fp32 (not where W is fp64) where
    they changed, the rest as it came. W + scaling * B A of adapted weights, of experts each its
    own; of DoRA each row of that brought to the length of its magnitude; W with other rows where
    tokens were trained.

    `adapter` holds the adapter's tensors by our names and, whole, the parameters trained besides
    (`train_also`), which take the place of the base's; a reward model's score takes that of the
    head. Raises CheckpointError: a tensor of the adapter belongs to none of the base's, or has
    another shape."""
    unused = set(adapter)
    for name, tensor in base:
        if name == HEAD and SCORE in adapter:
            continue
        layer = name.removesuffix(".weight")
        if name in adapter:
            _check_shape(name, adapter[name].shape, tensor.shape)
            tensor = adapter[name]
        else:
            tensor = _changed(name, tensor, layer, adapter, lora)
        yield name, tensor
        unused -= {name, *(layer + suffix for suffix in (A_SUFFIX, B_SUFFIX, MAGNITUDE, ROWS))}
    if SCORE in unused:
        unused.remove(SCORE)
        yield SCORE, adapter[SCORE]
    if unused:
        raise CheckpointError(f"{min(unused)}: the base has no weight for it; it is another model")


def _changed(
    name: str, weight: Tensor, layer: str, adapter: Mapping[str, Tensor], lora: LoRAConfig
) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)

    def own(suffix: str) -> Tensor | None:
        tensor = adapter.get(layer + suffix)
        return None if tensor is None else tensor.detach().to("cpu", torch.float64)

    down, up, lengths, rows = (own(suffix) for suffix in (A_SUFFIX, B_SUFFIX, MAGNITUDE, ROWS))
    if down is not None and up is not None:
        shape = torch.Size((*up.shape[:-1], down.shape[-1]))
        _check_shape(name, shape, weight.shape)
        weight = weight.detach().to("cpu", torch.float64).add(up @ down, alpha=lora.scaling)
        if lengths is not None:
            weight = weight * (lengths / torch.linalg.vector_norm(weight, dim=1))[:, None]
    if rows is not None:
        _check_shape(name, rows.shape, torch.Size((len(lora.trainable_tokens), weight.shape[1])))
        tokens = torch.tensor(lora.trainable_tokens)
        weight = weight.detach().to("cpu", wide).index_copy(0, tokens, rows.to(wide))
    return weight if down is None else weight.to(wide)


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
    which an adapter cannot hold, PEFT has no place for a part of the adapter, or the folder is in
    use.

    Args:
        tensors: the adapter's, by our names, whole, on any device.
        folder: must not exist, or be empty.
        base_name: name or path of the `transformers` model that it belongs to.
        dtype: of the tensors on disk; default: float32.
    """
    from safetensors.torch import save_file

    found = tensors.items() if isinstance(tensors, Mapping) else tensors
    own = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in found}
    if whole := [name for name in own if not is_adapter(name)]:
        raise NotForPeftError(
            f"{whole[0]}: trained whole (train_module.lora.train_also), which no adapter holds"
        )
    transformer = config.to_transformer()
    modules = _their_modules(transformer, family.rules(transformer), own, lora)
    if all(module.rank is None for module in modules):  # another type of adapter, without wrapper
        modules = [
            module._replace(tensors={_TOKENS_ALONE: next(iter(module.tensors.values()))})
            for module in modules
        ]
    weights = {
        f"{_PREFIX}{module.name}{suffix}": tensor.to(dtype or torch.float32).contiguous()
        for module in modules
        for suffix, tensor in module.tensors.items()
    }
    settings = _peft_config(transformer, modules, lora, base_name)
    with new_output(folder) as unfinished:
        save_file(weights, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json_atomic(unfinished / CONFIG_FILE, settings, sync=False)


class _TheirModule(NamedTuple):
    name: str
    tensors: dict[str, Tensor]
    """By what follows the name."""
    rank: int | None = None
    """Of its low-rank adapter; None: it has none."""
    is_transposed: bool = False
    """The layer keeps its weight as `(in, out)`."""


def _their_modules(
    model: TransformerConfig, rules: list[Rule], own: dict[str, Tensor], lora: LoRAConfig
) -> list[_TheirModule]:
    """Adapters on the family's modules."""
    shapes = parameter_shapes(model)
    unused = {name.rpartition(".lora_")[0] or name.removesuffix(ROWS) for name in own}
    filled = _experts_to_fill(rules, unused)
    modules = []
    for rule in rules:
        names = [name.removesuffix(".weight") for name in rule.ours]
        if rule.transform is STACKED:
            if rule.ours[0] in filled:
                modules += _experts(rule, own, shapes, lora)
        elif not unused.intersection(names) or not rule.theirs[0].endswith(".weight"):
            continue
        elif names[0] in (TOKENS, "head"):
            modules.append(_vocabulary(rule.theirs[0], names[0], model, own))
        else:
            modules.append(_linear(rule, [n for n in names if n in unused], own, shapes))
        unused -= set(names)
    if unused:
        raise NotForPeftError(
            f"{min(unused)}: the transformers class has no linear layer for this adapter"
        )
    if model.moe is not None:
        _check_beside_experts(modules)
    return modules


def _linear(
    rule: Rule, adapted: list[str], own: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> _TheirModule:
    """One of theirs that holds the layers of ours that `rule` names, some of them `adapted`."""
    downs = [_tensor(own, layer + A_SUFFIX) for layer in adapted]
    ups = {layer: _tensor(own, layer + B_SUFFIX) for layer in adapted}
    blocks, column, rank = [], 0, sum(up.shape[1] for up in ups.values())
    for name in rule.ours:
        block, up = torch.zeros(shapes[name][0], rank), ups.get(name.removesuffix(".weight"))
        if up is not None:
            end = column + up.shape[1]
            block[:, column:end] = up
            column = end
        blocks.append(block)
    tensors = {A_SUFFIX: torch.cat(downs), B_SUFFIX: rule.transform.join(blocks)[0]}
    theirs = rule.theirs[0].removesuffix(".weight")
    lengths = [own.get(name.removesuffix(".weight") + MAGNITUDE) for name in rule.ours]
    if given := [length for length in lengths if length is not None]:
        if len(given) < len(lengths):
            raise NotForPeftError(
                f"{adapted[0]}: DoRA on a part of {theirs}, of which peft trains all rows or none"
            )
        tensors[".lora_magnitude_vector"] = rule.transform.join(given)[0]
    return _TheirModule(theirs, tensors, rank, rule.transform.transposed)


def _vocabulary(
    theirs: str, layer: str, model: TransformerConfig, own: dict[str, Tensor]
) -> _TheirModule:
    """The embedding or the head."""
    name = theirs.removesuffix(".weight")
    if (rows := own.get(layer + ROWS)) is not None:
        return _TheirModule(name, {_TOKENS: rows})
    down, up = _tensor(own, layer + A_SUFFIX), _tensor(own, layer + B_SUFFIX)
    tensors = {".lora_embedding_A": up[: model.vocab_size].t(), ".lora_embedding_B": down.t()}
    return _TheirModule(name, tensors, down.shape[0])


def _experts_to_fill(rules: list[Rule], adapted: set[str]) -> set[str]:
    """Stacked matrices of ours that get an adapter there, of zeros where they have none: PEFT
    stacks those of all matrices and layers, or of none."""
    stacked = {rule.ours[0] for rule in rules if rule.transform is STACKED}
    return stacked if stacked & adapted else set()


def _experts(
    rule: Rule, own: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], lora: LoRAConfig
) -> list[_TheirModule]:
    experts, rows, columns = shapes[rule.ours[0]]
    downs = own.get(rule.ours[0] + A_SUFFIX, torch.zeros(experts, lora.rank, columns))
    ups = own.get(rule.ours[0] + B_SUFFIX, torch.zeros(experts, rows, lora.rank))
    return [
        _TheirModule(name.removesuffix(".weight"), {A_SUFFIX: down, B_SUFFIX: up}, lora.rank)
        for name, down, up in zip(rule.theirs, downs, ups, strict=True)
    ]


def _check_beside_experts(modules: list[_TheirModule]) -> None:
    """PEFT takes every layer that is called as one of experts for one of theirs."""
    for module in modules:
        is_expert, last = ".experts." in module.name, module.name.rpartition(".")[2]
        if not is_expert and last in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"):
            raise NotForPeftError(
                f"{module.name}: beside layers with experts, peft has no place for its adapter"
            )


def _peft_config(
    model: TransformerConfig, modules: list[_TheirModule], lora: LoRAConfig, base_name: str | None
) -> dict[str, Any]:
    from peft import LoraConfig, TaskType, TrainableTokensConfig

    ranks = {m.name: m.rank for m in modules if m.rank is not None}
    tokens = {m.name: list(lora.trainable_tokens) for m in modules if m.rank is None}
    common: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        # By SEQ_CLS peft asks the adapter for a head, which is the base's own.
        "task_type": TaskType.CAUSAL_LM if model.num_scores is None else None,
        "inference_mode": True,
    }
    if not ranks:
        names = list(tokens)
        return _plain(
            TrainableTokensConfig(
                token_indices=list(lora.trainable_tokens), target_modules=names, **common
            )
        )
    other = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    embeddings = [m.name for m in modules if ".lora_embedding_A" in m.tensors]
    if model.tie_embeddings and embeddings and not embeddings[0].endswith("embed_tokens"):
        raise NotForPeftError(
            f"{embeddings[0]}: peft adapts no head that is tied to an embedding of this name"
        )
    return _plain(
        LoraConfig(
            r=lora.rank,
            # With the scaling of rsLoRA in it, which peft does not keep where it joins experts.
            lora_alpha=_whole(lora.scaling * lora.rank),  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            target_modules=list(ranks),
            trainable_token_indices=tokens or None,
            ensure_weight_tying=model.tie_embeddings and bool(embeddings),
            rank_pattern=other,
            alpha_pattern={name: _whole(lora.scaling * rank) for name, rank in other.items()},
            fan_in_fan_out=any(module.is_transposed for module in modules),
            **common,
        )
    )


def _plain(config: Any) -> dict[str, Any]:
    settings = config.to_dict()
    return {key: sorted(v) if isinstance(v, set) else v for key, v in settings.items()}


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name}: missing from the adapter")
    return tensors[name]


def _check_shape(name: str, own: torch.Size, base: torch.Size) -> None:
    if own != base:
        raise CheckpointError(
            f"{name}: the adapter is for shape {tuple(own)}, the base has {tuple(base)}; it is "
            "another model"
        )
