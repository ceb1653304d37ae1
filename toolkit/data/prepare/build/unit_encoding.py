"""From rows of preference and binary data to the documents of their units.

Prompt and sides are tokenized as TRL does it: the prompt alone, and the prompt with each side. The
tokens that all of them begin with are the prompt's; what follows belongs to the sides, so that both
have the same prompt whatever a tokenizer merges over its end.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from toolkit.data.prepare.build.encoding import Encoded
from toolkit.data.prepare.build.instructions import (
    InstructionEncoder,
    Look,
    Tokens,
    is_target_of,
    target_mask,
)
from toolkit.data.prepare.text.instructions.checks import NO_TARGET, excerpt
from toolkit.data.prepare.text.instructions.preference import (
    EQUAL_SIDES,
    READERS,
    Comparison,
    shown,
)
from toolkit.data.prepare.text.instructions.rendering import RenderedRow, Side
from toolkit.data.prepare.text.reading import Piece
from toolkit.data.tokens.units import CHOSEN, REJECTED
from toolkit.errors import DataError

_EMPTY = np.zeros(0, dtype=np.uint32)


class UnitEncoder(InstructionEncoder):
    """Encodes pieces that are rows of preference or binary data: each becomes the two documents of
    a unit. Those of a binary row are its prompt and its completion, of which joining makes the two
    documents of the unit (`build/completions.py`)."""

    num_changed = 0
    """Rows encoded whose prompt ends with other tokens once the answer follows..."""
    changed = ""
    """...and the end of the first of these prompts."""

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The first document of each piece, with the `second`; DataError names a row that cannot be
        used."""
        found: list[tuple[Comparison, list[Side], str | None]] = []
        rows: list[RenderedRow] = []
        for piece in pieces:
            assert piece.row is not None
            try:
                comparison, sides, reason = self._read(piece.row)
            except DataError as error:
                raise DataError(f"{piece.place or piece.identity}: {error}") from None
            found.append((comparison, sides, reason))
            if reason is None:
                rows += [_prompt(sides[0]), *(side.rendered for side in sides)]
        tokens = iter(self.tokenize(rows))
        encoded = []
        for comparison, sides, reason in found:
            if reason is not None:
                encoded.append(Encoded(_EMPTY, left_out=reason))
                continue
            prompt, *answers = (next(tokens) for _ in range(len(sides) + 1))
            shared = min(common_prefix(prompt[0], ids) for ids, _ in answers)
            if shared < len(prompt[0]):
                self.changed = self.changed or sides[0].rendered.text[: sides[0].start][-20:]
                self.num_changed += 1
            encoded.append(_unit(comparison, sides, shared, answers))
        return encoded

    def _read(self, row: dict[str, Any]) -> tuple[Comparison, list[Side], str | None]:
        """A row, its rendered sides, and why it is left out."""
        comparison = READERS[self._config.kind](row, self._config)
        if comparison.left_out is not None:
            return comparison, [], comparison.left_out
        sides = []
        for conversation in comparison.sides:
            side = self._renderer.render_side(conversation)
            if side is None:
                return comparison, [], NO_TARGET
            sides.append(side)
        first, last = (side.rendered.text[: side.start] for side in (sides[0], sides[-1]))
        if first != last:
            place = next(
                (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
                min(len(first), len(last)),
            )
            differ = (excerpt(text[max(0, place - 20) : place + 20], []) for text in (first, last))
            raise DataError(
                "the chat template writes the prompt differently for the two sides "
                f"({' and '.join(map(repr, differ))}); give a chat_template that does not look at "
                f"the answer before it writes the prompt: {shown(row)}"
            )
        return comparison, sides, None

    def look(self, row: dict[str, Any], encoded: Encoded) -> Look:
        """What the loss counts of a row that became `encoded`: of its prompt and of each side."""
        comparison, sides, _ = self._read(row)
        assert encoded.second is not None
        first, second = is_target_of(encoded), is_target_of(encoded.second)
        if self._config.kind == "binary":
            name = "desirable" if comparison.is_desirable else "undesirable"
            turns = [("prompt", first), (name, second)]
        else:
            # The sides differ behind what they share, perhaps not from their first tokens on.
            names = zip(("chosen", "rejected"), (first, second), strict=True)
            turns = [("prompt", first[: int(first.argmax())])]
            turns += [(name, side[int(side.argmax()) :]) for name, side in names]
        samples = [excerpt(side.rendered.text, side.rendered.targets or []) for side in sides]
        prompt = excerpt(sides[0].rendered.text[: sides[0].start], [])
        samples = [samples[0], *(text.removeprefix(prompt) for text in samples[1:])]
        return Look(
            self._renderer.template_of(comparison.sides[0]),
            np.concatenate([own for _, own in turns]),
            turns,
            " | rejected: ".join(samples),
        )

    def check(
        self,
        *,
        num_tokens: int,
        num_targets: int | None,
        filtered: Mapping[str, int],
        first_piece: Callable[[], Piece | None],
    ) -> None:
        """Raise DataError, which shows `first_piece`, when no row of a whole data set is left."""
        if num_targets:
            return
        reasons = ", ".join(f"{number:,} for {why}" for why, number in filtered.items() if number)
        piece = first_piece()
        row = {} if piece is None or piece.row is None else piece.row
        raise DataError(
            f"dataset.instructions: no row of this data can be trained on; left out were {reasons}"
            f"; give rows with two different answers (kind=preference) or with a label "
            f"(kind=binary); one row: {shown(row)}"
        )


def _prompt(side: Side) -> RenderedRow:
    row = side.rendered
    literals = [place for place in row.literals if place < side.start]
    return RenderedRow(row.text[: side.start], None, row.has_controls, literals)


def _unit(
    comparison: Comparison, sides: Sequence[Side], shared: int, answers: Sequence[Tokens]
) -> Encoded:
    """`shared` tokens are the prompt's."""
    documents = []
    for side, (ids, offsets) in zip(sides, answers, strict=True):
        row = side.rendered
        assert row.targets is not None
        targets = list(row.targets)
        if targets[0][0] <= side.start and shared < len(ids):
            # The end of the prompt that is tokenized in another way with the answer.
            targets[0] = min(int(offsets[shared, 0]), targets[0][0]), targets[0][1]
        is_target = target_mask(offsets, targets)
        is_target[:shared] = False
        documents.append(
            Encoded(
                ids,
                is_target,
                eos_is_target=row.eos_is_target,
                starts_with_bos=row.starts_with_bos,
                ends_with_eos=row.ends_with_eos,
            )
        )
    if not all(one.is_target.any() for one in documents if one.is_target is not None):
        return Encoded(_EMPTY, left_out=NO_TARGET)
    if len(documents) == 1:
        (whole,) = documents
        assert whole.is_target is not None
        target = CHOSEN if comparison.is_desirable else REJECTED
        second = whole._replace(
            ids=whole.ids[shared:],
            is_target=whole.is_target[shared:],
            starts_with_bos=True,
            target=target,
        )
        return whole._replace(
            ids=whole.ids[:shared],
            is_target=whole.is_target[:shared],
            eos_is_target=False,
            ends_with_eos=True,
            target=target,
            second=second,
        )
    chosen, rejected = documents
    if np.array_equal(chosen.ids, rejected.ids):
        return Encoded(_EMPTY, left_out=EQUAL_SIDES)
    return chosen._replace(target=CHOSEN, second=rejected._replace(target=REJECTED))


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Elements that both begin with."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size
