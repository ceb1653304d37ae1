"""Keys of a turn that say whether the loss counts it.

Data of other trainers mark turns: `weight: 0` (OpenAI, Mistral), `train: false` (Axolotl), `loss:
false` (ms-swift), `masked: true` (torchtune). Which keys mean that is in the config. Any other key
whose name looks like it is refused: ignored, it would train a turn that must not be trained.
"""

import re
from typing import Any

from toolkit.data.source_config import InstructionsConfig
from toolkit.errors import DataError

_LOOKS_LIKE_IT = re.compile(
    r"(^|_)(weights?|train(s|ed|ing|able)?|loss|losses|mask(s|ed|ing)?|ignored?)(_|$)"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_OPTIONS = "dataset.instructions.train_keys, mask_keys or ignored_keys"


def is_trained(turn: dict[str, Any], config: InstructionsConfig, where: str) -> bool | None:
    """Whether `turn` is trained on by its own keys; None: it has none, or they are null.

    Raises:
        DataError: a value is neither yes nor no, two keys disagree, or a key that is not in the
            config looks as if it meant this.
    """
    found: dict[str, bool] = {}
    for key, value in turn.items():
        if value is None or key in config.ignored_keys:
            continue
        if key in config.train_keys:
            found[key] = _flag(key, value, where)
        elif key in config.mask_keys:
            if _flag(key, value, where):
                found[key] = False
        else:
            refuse_look_alike(key, where)
    if len(set(found.values())) > 1:
        raise DataError(f"{where}: {' and '.join(found)} contradict each other")
    return next(iter(found.values()), None)


def is_row_trained(row: dict[str, Any], config: InstructionsConfig, where: str) -> bool | None:
    """What the keys that `is_trained` reads say of all turns of a row, where they are columns;
    other columns are nobody's business.

    Raises:
        DataError: a value is neither yes nor no, or two keys disagree.
    """
    read = {*config.train_keys, *config.mask_keys}
    return is_trained({key: row[key] for key in row if key in read}, config, where)


def without_turn_keys(turn: dict[str, Any], config: InstructionsConfig) -> dict[str, Any]:
    """`turn` without the keys that `is_trained` reads: they are no part of what is said."""
    read = {*config.train_keys, *config.mask_keys} - {*config.ignored_keys}
    return {key: value for key, value in turn.items() if key not in read}


def refuse_look_alike(key: str, where: str) -> None:
    """Raise DataError when the name of a key that nothing reads looks as if it masked."""
    if _LOOKS_LIKE_IT.search(_CAMEL.sub("_", key).lower().replace("-", "_")):
        raise DataError(
            f"{where}: the key {key!r} may say that this is not trained on, and nothing reads it; "
            f"take it out of the rows, or name it in {_OPTIONS}"
        )


def _flag(key: str, value: Any, where: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise DataError(
        f"{where}: {key} is {value!r}; a turn is trained on (1 or true) or not (0 or false), "
        f"nothing between; correct it, or change {_OPTIONS}"
    )
