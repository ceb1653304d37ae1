"""Does a run stay within the repetition limits of its sources?"""

from fractions import Fraction

from toolkit.data.order.mixture import MixedStream, MixPlan
from toolkit.errors import ConfigError
from toolkit.wording import count


def check_limits(
    mixture: MixedStream | MixPlan, total_instances: int, *, batch_instances: int = 1
) -> None:
    """Check that the first `total_instances` instances repeat no source more than it may be.

    Args:
        batch_instances: training stops between batches of this size.

    Raises:
        ConfigError: one is repeated more; says by how much, and what would work.
    """
    plan = mixture.plan if isinstance(mixture, MixedStream) else mixture
    broken = sorted((end, name) for name, end in plan.ends.items() if end < total_instances)
    if not broken:
        return
    end, name = broken[0]
    others = sorted(other for _, other in broken[1:])
    counts = plan.counts(total_instances)
    length, available = plan.sequence_length, plan.available[name]
    also = f" (so do {', '.join(others)})" if others else ""
    longest = end // batch_instances * batch_instances * length
    ways = [
        *_ratio_that_works(plan, name, total_instances),
        f"train on at most {count(longest, 'token')} (trainer.max_duration)",
        "raise its max_repetitions",
    ]
    raise ConfigError(
        f"dataset.mix: {name} breaks its limit of {plan.sources[name].max_repetitions:g} "
        f"repetitions{also}: the run takes {count(counts[name] * length, 'token')} of it, "
        f"{_floor(Fraction(counts[name], max(1, available)))} times the {available * length:,} "
        f"there are; {', or '.join(ways)}"
    )


def _ratio_that_works(plan: MixPlan, name: str, total_instances: int) -> list[str]:
    """The largest share that stays within the limit, where one number tells it."""
    limit = plan.limits[name]
    assert limit is not None
    if len(plan.segments) > 1 or len(plan.names) == 1:
        return []
    now, most = plan.segments[0].shares[name], Fraction(limit, total_instances)
    words = f"lower its share from {_percent(now)} to {_percent(most)} of the mixture"
    if "/" not in name:
        words += f" (its ratio times {_floor(most * (1 - now) / ((1 - most) * now))})"
    return [words]


def _percent(share: Fraction) -> str:
    return f"{_floor(100 * share)}%"


def _floor(value: Fraction) -> str:
    """Four digits, never rounded up."""
    digits = 4
    while value and value * 10 ** (digits - 1) < 100 and digits < 12:
        digits += 1
    return f"{int(value * 10**digits) / 10**digits:.{digits}f}".rstrip("0").rstrip(".")
