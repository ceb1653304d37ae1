"""Some rows of instruction data, looked at before all of them are encoded.

What is wrong with a template or with the shape of rows shows in the first few of them, minutes or
hours before a large source is encoded.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from toolkit.data.prepare.build.instructions import InstructionEncoder
from toolkit.data.prepare.build.unit_encoding import UnitEncoder
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, read_shard
from toolkit.data.prepare.text.sources import Shard
from toolkit.data.tokens.audit import Counted, TargetAudit
from toolkit.errors import DataError
from toolkit.wording import count

NUM_ROWS = 256
NUM_SHARDS = 16


def audit_rows(
    encoder: InstructionEncoder,
    shards: Sequence[Shard],
    reading: Reading,
    warn: Callable[[str], object],
) -> TargetAudit:
    """Look at the first rows of some of `shards`. Raises DataError where one cannot be rendered.
    Where there are more rows than these, and the loss would count nothing of them, or all, `warn`
    is told: only all rows together are refused for that."""
    pieces, is_all = _some_rows(shards, reading)
    roles: dict[str, Counter[bool]] = {}
    templates: dict[str, Counter[bool]] = {}
    sample, left_out = None, Counter[str]()
    encoded = encoder.encode(pieces)
    for piece, found in zip(pieces, encoded, strict=True):
        if found.left_out is not None:
            left_out[found.left_out] += 1
            continue
        assert piece.row is not None
        look = encoder.look(piece.row, found)
        if sample is None:
            sample = look.sample
        for role, own in look.turns:
            roles.setdefault(role, Counter()).update(own.tolist())
        templates.setdefault(look.template, Counter()).update(look.is_target.tolist())
    audit = TargetAudit(
        num_rows=len(pieces),
        without_target=left_out.total(),
        roles=_counted(roles),
        templates=_counted(templates),
        sample=sample,
    )
    if isinstance(encoder, UnitEncoder) and encoder.num_changed:
        warn(
            f"warning: in {count(encoder.num_changed, 'row')} of {audit.num_rows:,} looked at, the "
            "tokenizer writes the end of the prompt with other tokens once the answer follows "
            f"(first: {encoder.changed!r}), and a model that is asked sees the former; end prompts "
            "where a token ends (mostly: not with a space)"
        )
    if not is_all and (problem := _problem(encoder, audit, left_out, pieces)) is not None:
        number = count(audit.num_rows, "row")
        warn(
            f"warning: {problem} (told by the first {number}; the others are encoded all the same)"
        )
    return audit


def _problem(
    encoder: InstructionEncoder,
    audit: TargetAudit,
    left_out: Mapping[str, int],
    pieces: Sequence[Piece],
) -> str | None:
    found = audit.templates.values()
    try:
        encoder.check(
            num_tokens=sum(counted.num_tokens for counted in found),
            num_targets=sum(counted.num_targets for counted in found),
            filtered=left_out,
            first_piece=lambda: next(iter(pieces), None),
        )
    except DataError as error:
        return str(error)
    return None


def _some_rows(shards: Sequence[Shard], reading: Reading) -> tuple[list[Piece], bool]:
    """As many rows of each of some shards, and whether these are all rows there are."""
    number = min(len(shards), NUM_SHARDS)
    pieces: list[Piece] = []
    is_all = number == len(shards)
    for turn in range(number):
        quota = (NUM_ROWS - len(pieces)) // (number - turn)
        rows = read_shard(shards[turn * len(shards) // number], reading, Counts())
        own = list(itertools.islice(rows, quota + 1))
        is_all = is_all and len(own) <= quota
        pieces += own[:quota]
    return pieces, is_all


def _counted(found: Mapping[str, Counter[bool]]) -> dict[str, Counted]:
    return {name: Counted(own.total(), own[True]) for name, own in sorted(found.items())}
