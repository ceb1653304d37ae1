"""What identifies instances: the tokens, where documents start, and how rows are cut of them.

Needs no numpy.
"""

from toolkit.data.instances.plans import Plan
from toolkit.data.tokens.prepared import PreparedDataset, Split
from toolkit.errors import ConfigError

INSTANCES_VERSION = 1
"""Changes when the same settings would give other rows."""


def instances_fingerprint(
    prepared: PreparedDataset, split: Split, kind: str, **settings: int | bool
) -> str:
    """16 hex digits that differ where any row does.

    Args:
        settings: whatever decides, beside the tokens, what a row of this kind holds.
    """
    import xxhash

    info = prepared.manifest.splits[split]
    # Token files made before indexes were hashed are told apart by the number of documents.
    index = info.index_hash or info.num_documents
    tokens = prepared.fingerprint(split)
    identity = (INSTANCES_VERSION, tokens, index, kind, sorted(settings.items()))
    return xxhash.xxh3_64_hexdigest(repr(identity).encode())


def packed_plan(prepared: PreparedDataset, split: Split, sequence_length: int) -> Plan:
    """The plan of packed instances, made or not."""
    fingerprint = instances_fingerprint(prepared, split, "packed", sequence_length=sequence_length)
    return Plan(prepared, split, "packed", sequence_length, fingerprint)


def padded_plan(prepared: PreparedDataset, split: Split, sequence_length: int) -> Plan:
    """The plan of padded instances, made or not."""
    fingerprint = instances_fingerprint(prepared, split, "padded", sequence_length=sequence_length)
    return Plan(prepared, split, "padded", sequence_length, fingerprint)


def variable_plan(
    prepared: PreparedDataset, split: Split, sequence_length: int, *, min_length: int
) -> Plan:
    """The plan of variable-length instances, made or not.

    Raises:
        ConfigError: see `VariableDataset`.
    """
    if sequence_length.bit_count() != 1:
        below = 1 << (sequence_length.bit_length() - 1)
        raise ConfigError(
            f"dataset.sequence_length {sequence_length} must be a power of two with "
            f"dataset.instances of type variable; the nearest are {below} and {2 * below}"
        )
    if min_length > sequence_length:
        raise ConfigError(
            f"dataset.instances.min_sequence_length {min_length} is more than "
            f"dataset.sequence_length {sequence_length}; make it smaller"
        )
    fingerprint = instances_fingerprint(
        prepared, split, "variable", sequence_length=sequence_length, min_length=min_length
    )
    return Plan(prepared, split, "variable", sequence_length, fingerprint)
