"""From a row to its text: one column, or a template over several."""

import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from toolkit.data.config import DiskSourceConfig, FilesSourceConfig, HubSourceConfig, SourceConfig
from toolkit.data.tokens.units import fitting_kind, fitting_settings
from toolkit.errors import DataError


class TextColumns:
    """How the rows of one source become text, of the columns `names`; DataError for a template that
    cannot be used."""

    def __init__(self, source: FilesSourceConfig | HubSourceConfig | DiskSourceConfig) -> None:
        template = source.text_template
        self.is_template = template is not None
        self._option = f"dataset.source.text_{'template' if self.is_template else 'field'}"
        self._parts: list[tuple[str, str | None]] = [("", source.text_field)]
        if template is not None:
            self._parts = _parse(template)
        self.names = list(dict.fromkeys(name for _, name in self._parts if name is not None))

    def check(self, known: Iterable[str], where: object) -> None:
        """Raise DataError when a column is not among `known`, the columns of `where`."""
        known = list(known)
        missing = [name for name in self.names if name not in known]
        if missing:
            kind = fitting_kind(known)
            fits = "" if kind is None else f" (of {kind} data: set {fitting_settings(kind)})"
            raise DataError(
                f"{self._option}: {where} has no column {missing[0]!r}; its columns: "
                f"{', '.join(known) or 'none at all'}{fits}"
            )

    def check_used(self, where: str) -> None:
        """Raise DataError when columns were asked for; `where` holds plain text alone."""
        if self.is_template or self.names != [FilesSourceConfig(paths=[]).text_field]:
            raise DataError(
                f"{self._option}: names a column, but {where} holds plain text, which has none; "
                "leave it out"
            )

    def text(self, row: Mapping[str, Any], where: object) -> str:
        """The text of a row; null and NaN, which stands for it in tables of numbers, are no text.
        DataError for a column that is missing or holds none."""
        found = []
        for literal, name in self._parts:
            found.append(literal)
            if name is None:
                continue
            if name not in row:
                self.check(row, where)
            value = row[name]
            if value is None or value != value:  # NaN
                continue
            if isinstance(value, str | int | float if self.is_template else str):
                found.append(str(value))
            else:
                raise DataError(
                    f"{self._option}: {where}: column {name!r} holds {type(value).__name__}, not "
                    "text"
                )
        return "".join(found)


def text_columns(source: SourceConfig, *, rows: bool) -> TextColumns | None:
    """How rows of `source` become text; None for sources without rows, and where rows are taken as
    they are."""
    if not rows and isinstance(source, FilesSourceConfig | HubSourceConfig | DiskSourceConfig):
        return TextColumns(source)
    return None


def row_texts(value: Any) -> Iterator[str]:
    """Every text in a row, depth first."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from row_texts(inner)


def _parse(template: str) -> list[tuple[str, str | None]]:
    parts: list[tuple[str, str | None]] = []
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"dataset.source.text_template: {error}; write {{column}} for the value of a column, "
            "{{ and }} for braces"
        ) from None
    for literal, name, rule, conversion in pieces:
        if name is not None and (not name or rule or conversion):
            raise DataError(
                "dataset.source.text_template: between braces stands the name of a column and "
                f"nothing else: {template!r}"
            )
        parts.append((literal, name))
    if all(name is None for _, name in parts):
        raise DataError(
            f"dataset.source.text_template: {template!r} names no column; write {{column}}"
        )
    return parts
