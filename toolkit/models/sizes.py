"""The largest sizes that a model may have: beyond all that exists, and small enough to count."""

LARGEST: dict[str, int] = {
    "vocab_size": 1 << 31,
    "vocab_multiple": 1 << 31,
    "d_model": 1 << 24,
    "num_layers": 10_000,
    "num_heads": 1 << 20,
    "num_key_value_heads": 1 << 20,
    "head_dim": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_experts": 100_000,
    "max_sequence_length": 1 << 40,
}
"""By the names of our configs."""
MOST_EXPERTS = 1_000_000
"""Of all layers together."""
MOST_PARAMETERS = 10**16


def check_sizes(sizes: dict[str, int | None], names: dict[str, str] | None = None) -> None:
    """Raise ValueError for a size that is larger than any model's: what is made of it would fill
    the memory before an error is found.

    Args:
        sizes: by names of `LARGEST`.
        names: what messages call them, where that is another name.
    """
    for name, value in sizes.items():
        largest = LARGEST[name]
        if value is not None and value > largest:
            shown = (names or {}).get(name, name)
            size = f"{value:,}" if value < 10**18 else "of more than 18 digits"
            raise ValueError(f"{shown} {size} is larger than any model's (at most {largest:,})")
    experts = (sizes.get("num_experts") or 0) * (sizes.get("num_layers") or 1)
    if experts > MOST_EXPERTS:
        raise ValueError(
            f"{experts:,} experts in all layers are more than any model has (at most "
            f"{MOST_EXPERTS:,})"
        )
