"""The fields of a config.json, of which none may be overlooked."""

from collections.abc import Collection, Mapping
from typing import Any

from toolkit.errors import CheckpointError

_REQUIRED: Any = object()


class Settings:
    """Reads fields and remembers which ones were.

    Args:
        values: the fields, in the form that transformers >= 5 gives them (`rope_parameters`,
            `layer_types`).
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._taken: set[str] = set()
        self.notes: list[str] = []
        """What the user should know, a line each."""

    @property
    def model_type(self) -> str:
        """The family's name."""
        return str(self._values.get("model_type"))

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a field.

        Raises:
            CheckpointError: it is missing and there is no default.
        """
        self._taken.add(name)
        value = self._values.get(name, default)
        if value is _REQUIRED:
            raise CheckpointError(f"config.json: {name} is missing")
        return value

    def require(self, name: str, *allowed: Any) -> Any:
        """The value of a field that must be one of `allowed`, or absent: then the first of them.

        Raises:
            CheckpointError: it is another one; our parts cannot compute that.
        """
        value = self.take(name, allowed[0])
        if value not in allowed:
            known = " or ".join(repr(choice) for choice in allowed)
            raise CheckpointError(
                f"config.json: {name} {value!r} is not covered by the mapping of "
                f"{self.model_type}, which knows {known}"
            )
        return value

    def without_effect(self, *names: str) -> None:
        """Fields that change neither weights nor logits. A dropout that is not 0 is noted: training
        here uses none."""
        for name in names:
            value = self.take(name, None)
            if value and ("drop" in name):
                self.notes.append(f"{name} {value} of the original is not used in training")

    def check_all_taken(self, meaningful: Collection[str]) -> None:
        """Raise CheckpointError, naming it, for a field of `meaningful` that nobody has read,
        unless it switches something off."""
        for name in sorted(set(meaningful) & set(self._values) - self._taken):
            if self._values[name] is None or self._values[name] is False:
                continue
            raise CheckpointError(
                f"config.json: {name} {self._values[name]!r} is not covered by the mapping of "
                f"{self.model_type}"
            )
