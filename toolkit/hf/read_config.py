"""config.json of a `transformers` folder as one of our model configs."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from toolkit.data.prepare.tokenizers.backend import check_small_files
from toolkit.errors import CheckpointError
from toolkit.hf.families import FAMILIES
from toolkit.hf.family import SCORED, Family, Settings
from toolkit.hf.loading import quiet_transformers
from toolkit.models.config import TransformerConfig, check_sizes
from toolkit.storage.foreign import guard, read_bytes, reason_of

NEW_FAMILY = "docs/finetuning.md#a-new-family"
TEXT_PART = "docs/finetuning.md#the-text-part-of-a-multimodal-model"

_NOT_OF_THE_MODEL = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Every config class names these; they are about generation and tokenizers."""
_BEYOND_THE_CLASS = {"head_dim"}
"""Modelling code looks for these also where its config class does not define them."""

DEFAULT_LABELS = 2
"""Scores that `transformers` gives where config.json does not say how many."""

_SIZES = {
    "vocab_size": ("vocab_size",),
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": (
        "intermediate_size", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size",
    ),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "max_sequence_length": ("max_position_embeddings", "n_positions", "n_ctx"),
}  # fmt: skip
"""Fields of config.json that are sizes, by our names."""


class HFModel(NamedTuple):
    family: Family
    config: TransformerConfig
    notes: tuple[str, ...]
    """What the user should know, a line each."""


def read_hf_config(folder: Path) -> HFModel:
    """Read config.json of a model folder; nothing is downloaded and no code of the folder is run.

    The config class of `transformers` brings the spellings of all years into one form and fills in
    its defaults, so only what that class means is read here. Raises CheckpointError: the file is
    missing or damaged, no mapping knows its `model_type`, or the mapping does not cover one of its
    fields."""
    folder = Path(folder)
    raw = _read_json(folder)
    check_small_files(folder, CheckpointError)
    try:
        return _read(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from None


def _read(raw: dict[str, Any]) -> HFModel:
    """What messages call config.json is `raw`."""
    family = _family(raw)
    _refuse(raw)
    _check_sizes(raw)
    settings, meaningful = _normalised(raw, family)
    not_built = "not a model that can be built"
    with guard("config.json", CheckpointError, problem=not_built):
        fields = family.read_config(settings)
    settings.check_all_taken(meaningful)
    fields |= _scores(raw)
    try:
        # Back and forth: a struct checks types only where it is made of builtin values.
        config = TransformerConfig(**fields)
        config = msgspec.convert(msgspec.to_builtins(config), TransformerConfig)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: {not_built}: {error}") from None
    return HFModel(family, config, tuple(settings.notes))


def _scores(raw: dict[str, Any]) -> dict[str, int]:
    """The head of a class that gives scores."""
    classes = raw.get("architectures")
    if not (isinstance(classes, list) and classes and str(classes[0]).endswith(SCORED)):
        return {}
    labels, number = raw.get("id2label"), raw.get("num_labels")
    if isinstance(number, int):
        return {"num_scores": number}
    return {"num_scores": len(labels) if isinstance(labels, dict) else DEFAULT_LABELS}


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a Hugging Face model")
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: an adapter without its model; convert the model that its "
                "adapter_config.json names (base_model_name_or_path)"
            )
        raise CheckpointError(
            f"{folder}: no config.json here; give a folder that holds config.json and the weights"
        )
    data = read_bytes(path, CheckpointError)
    with guard(path, CheckpointError, "copy the model again", problem="cannot be read as JSON"):
        raw = json.loads(data)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object; copy the model again")
    return raw


def _family(raw: dict[str, Any]) -> Family:
    model_type = raw.get("model_type")
    known = {family.model_type: family for family in FAMILIES}
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    names, text = ", ".join(sorted(known)), raw.get("text_config")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"config.json: model_type is missing; add the one of these that the model is: {names}"
        )
    if isinstance(text, dict):
        inner = text.get("model_type")
        part = f" of model_type {inner}" if isinstance(inner, str) else ""
        raise CheckpointError(
            f"config.json: model_type {model_type!r} wraps a text model{part} with other inputs, "
            f"which are not supported; save its text model alone, see {TEXT_PART} (known: {names})"
        )
    code = " and its own code (auto_map), which is never run" if "auto_map" in raw else ""
    raise CheckpointError(
        f"config.json: no mapping for model_type {model_type!r}{code}; known: {names}; "
        f"to add one see {NEW_FAMILY}"
    )


def _refuse(raw: dict[str, Any]) -> None:
    """What concerns every family."""
    for name in ("quantization_config", "compression_config"):
        if raw.get(name):
            method = raw[name].get("quant_method") if isinstance(raw[name], dict) else None
            kind = f" ({method})" if method else ""
            raise CheckpointError(
                f"config.json: {name}{kind}: quantised weights cannot be converted; take the "
                "model that was quantised"
            )
    for name in ("is_encoder_decoder", "per_layer_config", "pruned_heads"):
        if raw.get(name):
            raise Settings(raw).not_covered(f"{name} {raw[name]!r}")


def _check_sizes(raw: dict[str, Any]) -> None:
    """Before any class makes lists of them. Other types and signs are for the classes to refuse."""
    sizes: dict[str, int | None] = {}
    names: dict[str, str] = {}
    for ours, theirs in _SIZES.items():
        found = [(raw[name], name) for name in theirs if isinstance(raw.get(name), int)]
        if found:
            sizes[ours], names[ours] = max(found)
    try:
        check_sizes(sizes, names)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}; copy the model again") from None


def _normalised(raw: dict[str, Any], family: Family) -> tuple[Settings, frozenset[str]]:
    """Fields as the config class of `transformers` has them, with a note of what it keeps without
    knowing it; and the names of those that may decide the logits."""
    with quiet_transformers():
        from transformers import PreTrainedConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        try:
            # A copy: the classes change what they are given.
            theirs = CONFIG_MAPPING[family.model_type].from_dict(json.loads(json.dumps(raw)))
        except Exception as error:
            reason = reason_of(error).rstrip(".")
            raise CheckpointError(
                f"config.json: transformers cannot read it: {reason}; correct the file"
            ) from None
        common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        own = {field.name for field in dataclasses.fields(theirs)} - common
        meaningful = (own | _BEYOND_THE_CLASS) - _NOT_OF_THE_MODEL
        values = {name: getattr(theirs, name) for name in meaningful if hasattr(theirs, name)}
        unknown = (vars(theirs).keys() & raw.keys()) - common - own - {"model_type"} - meaningful
        # A field of the class may be kept under another name.
        unknown -= {kept for name, kept in theirs.attribute_map.items() if name in own}
    ignored = [
        f"{name} {raw[name]}"
        for name in sorted(unknown)
        if isinstance(raw[name], int | float) and raw[name] is not False
    ]
    if "auto_map" in raw:
        ignored.append("the model's own code (auto_map)")
    settings = Settings({"model_type": family.model_type, **values})
    if ignored:
        settings.notes.append(
            f"{', '.join(ignored)} of config.json means nothing to the class of transformers, so "
            "it is left out"
        )
    return settings, frozenset(meaningful)
