"""Names that stand for values of ours, OLMo-core's and those of tokenizers: kept under our names.

A name stands here only where it means the same; what differs stays an unknown name.
"""

from typing import Any

from toolkit.config.types import join, shown
from toolkit.data.config import TOKENIZER_PRESETS
from toolkit.errors import ConfigError

ALIASES: dict[str, str] = {
    "train_module.ac_config.activation_memory_budget": "train_module.ac_config.budget",
    "train_module.scheduler.warmup_steps": "train_module.scheduler.warmup",
    "train_module.scheduler.decay_steps": "train_module.scheduler.decay",
    "train_module.max_sequence_length": "dataset.sequence_length",
    "trainer.save_folder": "run.save_folder",
    "trainer.work_dir": "run.work_dir",
    "trainer.callbacks.checkpointer.save_interval": "trainer.callbacks.checkpointer.interval",
    "trainer.callbacks.checkpointer.ephemeral_save_interval": (
        "trainer.callbacks.checkpointer.ephemeral_interval"
    ),
    "trainer.callbacks.checkpointer.save_async": "trainer.callbacks.checkpointer.asynchronous",
    **{
        f"trainer.callbacks.{name}.{theirs}": f"trainer.callbacks.{name}.{ours}"
        for name in ("lm_evaluator", "downstream_evaluator")
        for theirs, ours in (("eval_interval", "interval"), ("eval_on_startup", "at_start"))
    },
    "model.block.name": "model.norm_placement",
    "model.block.attention.gate.granularity": "model.attention_gate",
    "init_seed": "seed",
}
"""Dotted path -> ours."""

_BLOCKS = {"default": "pre", "reordered_norm": "reordered", "peri_norm": "sandwich"}
_TYPES = {
    "model.norm_placement": _BLOCKS,
    "model.block.name": _BLOCKS,
    "train_module.attention_backend": {"torch": "sdpa", "flash_2": "flash", "flash_3": "flash3"},
    "train_module.scheduler.type": {
        "cos_with_warmup": "cosine",
        "linear_with_warmup": "linear",
        "constant_with_warmup": "constant",
        "half_cos_with_warmup": "half_cosine",
        "inv_sqrt_with_warmup": "inv_sqrt",
        "cos_with_warmup_and_linear_decay": "cosine_linear",
        "power_lr": "power",
    },
}
"""Dotted path -> value -> ours."""

_PARAMETERS = {
    "embeddings.weight": "embeddings.tokens.weight",
    "lm_head.w_out.weight": "head.weight",
    "lm_head.norm.weight": "head.norm.weight",
}
_PATTERNS = ("train_module.optim.group_overrides", "train_module.freeze")
_TOKENIZER = "dataset.tokenizer"
_BUDGET, _AC_CONFIG = "train_module.ac_config.budget", "train_module.ac_config"


def our_path(path: str) -> str:
    """`path` of a flag under our names."""
    return ALIASES.get(path, path)


def our_value(path: str, value: Any) -> Any:
    """What is given at `path` (ours; "" is the whole config), under our names; a copy."""
    value = _our_words(path, value)
    if isinstance(value, dict):
        for theirs, ours in ALIASES.items():
            if not path or (theirs.startswith(f"{path}.") and ours.startswith(f"{path}.")):
                _move(value, theirs, ours, path)
    return value


def _our_words(path: str, value: Any) -> Any:
    if isinstance(value, str):
        if path == _TOKENIZER and value in TOKENIZER_PRESETS:
            return dict(TOKENIZER_PRESETS[value])
        return _TYPES.get(path, {}).get(value, value)
    if path.startswith(_PATTERNS):
        return _our_patterns(value)
    if isinstance(value, dict):
        return {key: _our_words(join(path, key), inner) for key, inner in value.items()}
    return value


def implied(path: str, mode: Any) -> tuple[str, Any] | None:
    """A second value that a flag at `path` of OLMo-core gives with it, where ours needs one; `mode`
    is that of `ac_config`, as far as it is given."""
    if ALIASES.get(path) == _BUDGET and mode is None:
        return f"{_AC_CONFIG}.mode", "budget"
    return None


def _move(data: dict[str, Any], theirs: str, ours: str, path: str) -> None:
    """Rename a value of `data`, which lies at `path`."""
    *sections, name = theirs.removeprefix(f"{path}.").split(".")
    containers: list[Any] = [data]
    for section in sections:
        outer = containers[-1]
        containers.append(outer.get(section) if isinstance(outer, dict) else None)
    container = containers[-1]
    if not isinstance(container, dict) or name not in container:
        return
    value = container.pop(name)
    for section, outer in zip(reversed(sections), reversed(containers[:-1]), strict=True):
        if not outer[section]:  # of which nothing else was given
            del outer[section]
    *sections, name = ours.removeprefix(f"{path}.").split(".")
    container = data
    for section in sections:
        container = container.setdefault(section, {})
        if not isinstance(container, dict):
            return  # which `resolve` names
    if ours == _BUDGET:
        container.setdefault("mode", "budget")
    if container.setdefault(name, value) != value:
        problem = f"{theirs} {shown(value)} and {ours} {shown(container[name])}"
        raise ConfigError(f"{problem}: two names of one value; give one", about=theirs)


def _our_patterns(value: Any) -> Any:
    if isinstance(value, str):
        return _PARAMETERS.get(value, value)
    if isinstance(value, list):
        return [_our_patterns(item) for item in value]
    if isinstance(value, dict) and "params" in value:
        return {**value, "params": _our_patterns(value["params"])}
    return value


def without(data: dict[str, Any], path: str) -> dict[str, Any]:
    """`data` without what is at the dotted `path`."""
    name, _, rest = path.partition(".")
    if not rest or not isinstance(data.get(name), dict):
        return {key: value for key, value in data.items() if key != name}
    return {**data, name: without(data[name], rest)}
