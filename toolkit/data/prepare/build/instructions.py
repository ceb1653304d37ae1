"""From conversations to token ids, and which of them the loss asks for.

A row is rendered to text (`text/instructions/`), the texts of many rows are tokenized
at once, and the characters that the loss counts become tokens by position: a token is a target when
at least one of its characters is. What the template writes may be control tokens; the same
characters in a row's own text are ordinary ones.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toolkit.data.prepare.build.encoding import Encoded
from toolkit.data.prepare.text.instructions.checks import NO_TARGET, check_targets
from toolkit.data.prepare.text.instructions.rendering import RenderedRow, RowRenderer
from toolkit.data.prepare.text.instructions.template import (
    ChatTemplate,
    Span,
    read_chat_template,
)
from toolkit.data.prepare.text.reading import Piece
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.data.source_config import InstructionsConfig
from toolkit.errors import ConfigError, DataError

Tokens = tuple[np.ndarray, np.ndarray]
"""Ids, and characters of each: `(n,)` and `(n, 2)`."""


class Look(NamedTuple):
    """What the loss counts of a row."""

    template: str
    """Name of the chat template; `none`: there is none."""
    is_target: np.ndarray
    """Which of its tokens are targets: bool, `(num_tokens,)`."""
    turns: list[tuple[str, np.ndarray]]
    """The same of each turn, by its role."""
    sample: str
    """The row, shortened, targets between `[[` and `]]`."""


def with_instructions_template(tokenizer: Tokenizer, config: InstructionsConfig) -> Tokenizer:
    """The tokenizer with the config's chat template, to be stored beside the tokens: generation and
    export then use the one that was trained on. ConfigError: it cannot be read."""
    chosen = config.chat_template
    if chosen is None:
        return tokenizer
    named = tokenizer.chat_templates
    if chosen in named and not Path(chosen).expanduser().is_file():
        return tokenizer.with_chat_template(named[chosen])
    try:
        return tokenizer.with_chat_template(read_chat_template(chosen))
    except ConfigError as error:
        names = f"; the tokenizer's own templates are called {', '.join(named)}" if named else ""
        raise ConfigError(f"{error}{names}") from None


def chat_template(tokenizer: Tokenizer, text: str) -> ChatTemplate:
    """The template `text` with the control tokens of `tokenizer`. ConfigError: no valid Jinja."""
    named = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return ChatTemplate(
        text,
        control_tokens=list(tokenizer.control_tokens),
        variables={name: token or "" for name, token in named.items()},
    )


class InstructionEncoder:
    """Encodes pieces that are rows of instruction data. `append_eos`: an end-of-document token is
    put after documents without one. ConfigError: the chat template cannot be read."""

    def __init__(
        self, tokenizer: Tokenizer, config: InstructionsConfig, *, append_eos: bool = True
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        texts = with_instructions_template(tokenizer, config).chat_templates
        self._renderer = RowRenderer(
            config,
            texts,
            functools.partial(chat_template, tokenizer),
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            append_eos=append_eos,
        )

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The tokens of each piece's row, in order; DataError names a row that cannot be rendered,
        or has nothing that ends an answer."""
        rendered = []
        for piece in pieces:
            assert piece.row is not None
            try:
                rendered.append(self._renderer.render(piece.row))
            except DataError as error:
                raise DataError(f"{piece.place or piece.identity}: {error}") from None
        rows = [row for row in rendered if row is not None]
        tokens = iter(self.tokenize(rows))
        encoded = []
        for row in rendered:
            found = None if row is None else _encoded(row, next(tokens))
            encoded.append(found or Encoded(np.zeros(0, dtype=np.uint32), left_out=NO_TARGET))
        return encoded

    def look(self, row: dict[str, Any], encoded: Encoded) -> "Look":
        """What the loss counts of a row that became `encoded`."""
        outline = self._renderer.outline(row)
        is_target = is_target_of(encoded)
        # The characters of each token that `encode` gives.
        ((_, offsets),) = self.tokenize([outline.rendered])
        turns = [(role, is_target[target_mask(offsets, [span])]) for role, span in outline.turns]
        return Look(outline.template, is_target, turns, outline.sample)

    def check(
        self,
        *,
        num_tokens: int,
        num_targets: int | None,
        filtered: Mapping[str, int],
        first_piece: Callable[[], Piece | None],
    ) -> None:
        """Raise DataError, which shows `first_piece`, when the loss would count nothing of a whole
        data set, or everything though prompts should be left out."""

        def sample() -> tuple[str, int | None]:
            piece = first_piece()
            if piece is None or piece.row is None:
                return "none", None
            return self._renderer.sample(piece.row), self._renderer.masked_answer(piece.row)

        check_targets(
            self._config,
            num_tokens=num_tokens,
            num_targets=num_targets,
            filtered=filtered,
            sample=sample,
        )

    def tokenize(self, rows: Sequence[RenderedRow]) -> list[Tokens]:
        """The tokens of each row, in order."""
        encode = self._tokenizer.encode_offsets
        tokens: dict[int, Tokens] = {}
        for has_controls in (True, False):
            numbers = [n for n, row in enumerate(rows) if row.has_controls is has_controls]
            texts = [rows[n].text for n in numbers]
            if texts:
                tokens.update(zip(numbers, encode(texts, special_tokens=has_controls), strict=True))
        return [
            self._without_controls(row, tokens[number]) if row.literals else tokens[number]
            for number, row in enumerate(rows)
        ]

    def _without_controls(self, row: RenderedRow, tokens: Tokens) -> Tokens:
        """Encode again what stands between control tokens of the template and holds a literal."""
        ids, offsets = tokens
        is_control = np.isin(ids, list(self._tokenizer.control_tokens.values()))
        literals = np.array(row.literals)
        # A control token's characters may include white space around its name.
        holds_literal = np.searchsorted(literals, offsets[:, 0]) < np.searchsorted(
            literals, offsets[:, 1]
        )
        borders = np.flatnonzero(is_control & ~holds_literal)
        pieces, place, start = [], 0, 0
        for border in [*borders.tolist(), len(ids)]:
            end = int(offsets[border, 0]) if border < len(ids) else len(row.text)
            if np.any((literals >= start) & (literals < end)):
                pieces.append(self._ordinary(row.text[start:end], start))
            else:
                pieces.append((ids[place:border], offsets[place:border]))
            pieces.append((ids[border : border + 1], offsets[border : border + 1]))
            if border < len(ids):
                place, start = border + 1, int(offsets[border, 1])
        return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])

    def _ordinary(self, text: str, start: int) -> Tokens:
        """A part of a row, from character `start` on, as ordinary text."""
        encode = self._tokenizer.encode_offsets
        if start and self._starts_texts_with_space:
            # This is not the start: it is encoded after a line feed, which is taken out again.
            ((ids, offsets),) = encode([f"\n{text}"], special_tokens=False)
            count = int(np.count_nonzero(offsets[:, 1] <= 1))
            if count and np.all(offsets[count:, 0] >= 1):
                return ids[count:], offsets[count:] - 1 + start
        ((ids, offsets),) = encode([text], special_tokens=False)
        return ids, offsets + start

    @functools.cached_property
    def _starts_texts_with_space(self) -> bool:
        """Whether a word at the start of a text is encoded in another way than after a control
        token, as some tokenizers of SentencePiece's kind do."""
        encode = self._tokenizer.encode_offsets
        name = next(iter(self._tokenizer.control_tokens))
        ((inside, _),) = encode([f"{name}a"], special_tokens=True)
        ((first, _),) = encode(["a"], special_tokens=False)
        return not np.array_equal(inside[1:], first)


def is_target_of(encoded: Encoded) -> np.ndarray:
    """Which of a document's tokens the loss asks for."""
    if encoded.is_target is None:
        return np.ones(len(encoded.ids), dtype=bool)
    return encoded.is_target


def _encoded(row: RenderedRow, tokens: Tokens) -> Encoded | None:
    """None where no token is a target."""
    ids, offsets = tokens
    is_target = None
    if row.targets is not None:
        is_target = target_mask(offsets, row.targets)
        if not is_target.any():
            return None
    return Encoded(
        ids,
        is_target,
        eos_is_target=row.eos_is_target,
        starts_with_bos=row.starts_with_bos,
        ends_with_eos=row.ends_with_eos,
    )


def target_mask(offsets: np.ndarray, targets: Iterable[Span]) -> np.ndarray:
    """Which tokens have a character in one of `targets`: bool, shape `(n,)`.

    `offsets` are the first character of each token and one past the last, `(n, 2)`. A token without
    characters counts as the one that follows.
    """
    starts = offsets[:, 0]
    ends = np.maximum(offsets[:, 1], starts + 1)
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in targets:
        mask |= (starts < end) & (ends > start)
    return mask
