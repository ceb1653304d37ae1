"""Numbers, long names and labels in what people read."""

from collections.abc import Iterable, Sequence

_LONGEST = 240


def count(number: int, noun: str) -> str:
    """`1 token`, `2,000 tokens`, `3 processes`, `2 entries`."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "sh", "tch")):
        plural = f"{noun}es"
    elif noun.endswith("y") and noun[-2:-1] not in "aeiou":
        plural = f"{noun[:-1]}ies"
    else:
        plural = f"{noun}s"
    return f"{number:,} {plural}"


def prefixed(number: float, unit: str) -> str:
    """`999 B`, `1.23 kB`, `45.6 GB`."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} P{unit}"


def compact(number: float) -> str:
    """`999`, `20.5k`, `1.05M`: three digits."""
    return prefixed(number, "").replace(" ", "")


def labelled(rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """A line for each text of each (label, texts): the label before the first one."""
    return [
        f"{'' if number else label:<12}{text}"
        for label, texts in rows
        for number, text in enumerate(texts)
    ]


def shortened(text: str) -> str:
    """`text` as it is, cut where it is too long for a line."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def visible(text: str, *, kept: str = "") -> str:
    """Control characters as their names, but for those `kept`: what comes from elsewhere must not
    steer the terminal, nor write lines of its own."""
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


def span(seconds: float) -> str:
    """A time in its two largest units: `45s`, `3m 12s`, `2h 05m`, `3d 04h`."""
    whole = int(max(0.0, seconds))
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part:02d}{below}"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"
