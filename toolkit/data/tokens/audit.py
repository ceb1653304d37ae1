"""What the loss counts of instruction data, as dataset.json keeps it."""

from collections.abc import Iterator, Mapping

import msgspec

from toolkit.wording import count


class Counted(msgspec.Struct, frozen=True):
    """Tokens, and how many of them the loss asks for."""

    num_tokens: int
    num_targets: int

    @property
    def share(self) -> float:
        """Targets per token."""
        return self.num_targets / max(1, self.num_tokens)


class TargetAudit(msgspec.Struct, frozen=True, kw_only=True):
    """Of some rows, the first of files that are spread over the source."""

    num_rows: int
    """Rows looked at, those without a target among them."""
    without_target: int
    """Of preference and binary data: left out for any reason."""
    roles: dict[str, Counted]
    """By the role of the turn that the tokens belong to, which has what the template writes before
    and after it; of preference and binary data, by prompt and side."""
    templates: dict[str, Counted]
    """By the name of the chat template; `none`: prompts and completions are joined as they are."""
    sample: str | None = None
    """One row as it is trained on, shortened, targets between `[[` and `]]`."""

    def lines(self, *, of_units: bool = False) -> Iterator[str]:
        """What a log says of it; `of_units`: of preference and binary data."""
        total = Counted(
            sum(found.num_tokens for found in self.templates.values()),
            sum(found.num_targets for found in self.templates.values()),
        )
        why = "left out" if of_units else "without a target"
        left_out = f", {self.without_target:,} {why}" if self.without_target else ""
        yield (
            f"targets in {count(self.num_rows, 'row')} looked at{left_out}: {total.share:.1%} of "
            f"{count(total.num_tokens, 'token')}; by role: {_shares(self.roles)}; by template: "
            f"{_shares(self.templates)}"
        )
        if self.sample is not None:
            yield f"one row, targets in [[ ]]: {self.sample}"


def _shares(found: Mapping[str, Counted]) -> str:
    return ", ".join(f"{name} {counted.share:.1%}" for name, counted in sorted(found.items()))
