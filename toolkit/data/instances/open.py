"""The instances that a config asks for.

Only `open_instances` and making plans need numpy; nothing here needs torch.
"""

from typing import TYPE_CHECKING, Any

from toolkit.config.named import named
from toolkit.data.config import (
    DatasetConfig,
    FixedInstancesConfig,
    InstancesConfig,
    PackedInstancesConfig,
    PaddedInstancesConfig,
    VariableInstancesConfig,
)
from toolkit.data.instances.plans import plan_of
from toolkit.data.tokens.prepared import SPLITS, PreparedDataset, Split
from toolkit.data.tokens.units import name_of
from toolkit.errors import ConfigError

if TYPE_CHECKING:
    from toolkit.data.instances.rows import TokenRows

_CLASSES = {
    "fixed": "toolkit.data.instances.fixed:TokenDataset",
    "packed": "toolkit.data.instances.packed:PackedDataset",
    "padded": "toolkit.data.instances.planned:PaddedDataset",
    "variable": "toolkit.data.instances.variable:VariableDataset",
}
"""By the type of their config; they need numpy."""


def open_instances(
    prepared: PreparedDataset, split: Split, config: DatasetConfig, *, evaluation: bool = False
) -> "TokenRows":
    """The instances of one split; their plan is made now where it is missing.

    Args:
        evaluation: as `eval_instances` says; see `instances_config`.

    Raises:
        ConfigError: `sequence_length` does not suit the kind of instances.
        DataError: the token files or a plan are damaged, or the plan cannot be written.
    """
    kind = instances_config(config, evaluation=evaluation)
    check_unit_rows(prepared, kind)
    options: dict[str, Any] = {}
    if isinstance(kind, FixedInstancesConfig):
        options["intra_document_masking"] = kind.intra_document_masking
    elif isinstance(kind, VariableInstancesConfig):
        options["min_length"] = kind.min_sequence_length
    build = named(_CLASSES[str(kind.__struct_config__.tag)])
    instances: TokenRows = build(prepared, split, config.sequence_length, **options)
    return instances


def instances_config(config: DatasetConfig, *, evaluation: bool = False) -> InstancesConfig:
    """Kind of instances of training, or of evaluation: `eval_instances`, and where that is null,
    as in training; fixed, with attention inside documents, where that is variable."""
    if evaluation and config.eval_instances is not None:
        return config.eval_instances
    if evaluation and isinstance(config.instances, VariableInstancesConfig):
        # Training rows are of one document each.
        return FixedInstancesConfig(intra_document_masking=True)
    return config.instances


def check_unit_rows(prepared: PreparedDataset, kind: InstancesConfig) -> None:
    """Raise ConfigError where rows of this kind would cut units."""
    if prepared.unit is not None and not isinstance(
        kind, PackedInstancesConfig | PaddedInstancesConfig
    ):
        raise ConfigError(
            f"dataset.instances of type {kind.__struct_config__.tag} cut documents, and "
            f"{prepared.folder} holds {name_of(prepared.unit)}, which stay whole; set "
            "dataset.instances to packed, or to padded"
        )


def count_rows(
    prepared: PreparedDataset, split: Split, config: DatasetConfig, *, evaluation: bool = False
) -> list[tuple[int, int]] | None:
    """(length in tokens, number) of the instances, in about a millisecond; None: the plan that
    tells is not made. Errors as of `open_instances`."""
    if not prepared.has_split(split):
        return []
    kind, length = instances_config(config, evaluation=evaluation), config.sequence_length
    check_unit_rows(prepared, kind)
    if isinstance(kind, FixedInstancesConfig):
        return [(length, prepared.num_tokens(split) // length)]
    shortest = kind.min_sequence_length if isinstance(kind, VariableInstancesConfig) else None
    tag: Any = kind.__struct_config__.tag
    header = plan_of(prepared, split, tag, length, min_length=shortest).header()
    if header is None:
        return None
    buckets = [(bucket.length, bucket.num_instances) for bucket in header.buckets]
    return buckets or [(length, header.num_instances)]


def count_instances(
    prepared: PreparedDataset, split: Split, config: DatasetConfig, *, evaluation: bool = False
) -> int | None:
    """How many instances there are, as `count_rows` has them."""
    rows = count_rows(prepared, split, config, evaluation=evaluation)
    return None if rows is None else sum(number for _, number in rows)


def ensure_plans(prepared: PreparedDataset, config: DatasetConfig) -> None:
    """Make the plans of both splits that are missing; other processes that want them wait. Without
    a plan, the document index is checked where documents matter. What rows do to the targets of
    instruction data is said.

    Errors as of `open_instances`, and DataError: no row of training has a target.
    """
    for split in filter(prepared.has_split, SPLITS):
        evaluation = split == "val"
        kind = instances_config(config, evaluation=evaluation)
        if isinstance(kind, FixedInstancesConfig) and kind.intra_document_masking:
            named("toolkit.data.instances.index:verify_once")(prepared, split)
        instances = open_instances(prepared, split, config, evaluation=evaluation)
        if prepared.unit is not None:
            named("toolkit.data.instances.targets:check_units")(prepared, split, instances)
        elif prepared.manifest.splits[split].mask_hash is not None:
            check = named("toolkit.data.instances.targets:check_row_targets")
            check(prepared, split, instances)
