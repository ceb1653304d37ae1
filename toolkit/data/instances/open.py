"""The instances that a config asks for.

Only `open_instances` and making plans need numpy; nothing here needs torch.
"""

from typing import TYPE_CHECKING

from toolkit.data.config import DatasetConfig
from toolkit.data.instances.config import (
    FixedInstancesConfig,
    InstancesConfig,
    PackedInstancesConfig,
    PaddedInstancesConfig,
    VariableInstancesConfig,
)
from toolkit.data.instances.plans import Plan, packed_plan, padded_plan, variable_plan
from toolkit.data.tokens.prepared import PreparedDataset, Split

if TYPE_CHECKING:
    from toolkit.data.instances.base import InstanceDataset


def open_instances(
    prepared: PreparedDataset, split: Split, config: DatasetConfig, *, evaluation: bool = False
) -> "InstanceDataset":
    """The instances of one split; their plan is made now where it is missing.

    Args:
        evaluation: as `eval_instances` says; see `instances_config`.

    Raises:
        ConfigError: `sequence_length` does not suit the kind of instances.
        DataError: the token files or a plan are damaged, or the plan cannot be written.
    """
    kind, length = instances_config(config, evaluation=evaluation), config.sequence_length
    if isinstance(kind, PackedInstancesConfig):
        from toolkit.data.instances.packed import PackedDataset

        return PackedDataset(prepared, split, length)
    if isinstance(kind, PaddedInstancesConfig):
        from toolkit.data.instances.padded import PaddedDataset

        return PaddedDataset(prepared, split, length)
    if isinstance(kind, VariableInstancesConfig):
        from toolkit.data.instances.variable import VariableDataset

        return VariableDataset(prepared, split, length, min_length=kind.min_sequence_length)
    from toolkit.data.instances.fixed import TokenDataset

    return TokenDataset(prepared, split, length, intra_document_masking=kind.intra_document_masking)


def instances_config(config: DatasetConfig, *, evaluation: bool = False) -> InstancesConfig:
    """Kind of instances of training, or of evaluation: `eval_instances`, and where that is null,
    as in training; fixed, with attention inside documents, where that is variable."""
    if not evaluation:
        return config.instances
    if config.eval_instances is not None:
        return config.eval_instances
    if isinstance(config.instances, VariableInstancesConfig):
        # Training rows are of one document each.
        return FixedInstancesConfig(intra_document_masking=True)
    return config.instances


def count_rows(
    prepared: PreparedDataset, split: Split, config: DatasetConfig, *, evaluation: bool = False
) -> list[tuple[int, int]] | None:
    """(length in tokens, number) of the instances, in about a millisecond; None: the plan that
    tells is not made.

    Raises:
        ConfigError: `sequence_length` does not suit the kind of instances.
        DataError: the plan is damaged.
    """
    if not prepared.has_split(split):
        return []
    plan, length = _plan(prepared, split, config, evaluation=evaluation), config.sequence_length
    if plan is None:
        return [(length, prepared.num_tokens(split) // length)]
    header = plan.header()
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

    Raises:
        ConfigError: `sequence_length` does not suit the kind of instances.
        DataError: a document index is damaged, a plan cannot be written, or no row of training has
            a target.
    """
    splits: tuple[tuple[Split, bool], ...] = (("train", False), ("val", True))
    for split, evaluation in splits:
        if prepared.has_split(split):
            plan = _plan(prepared, split, config, evaluation=evaluation)
            kind = instances_config(config, evaluation=evaluation)
            has_mask = prepared.manifest.splits[split].mask_hash is not None
            if has_mask or (plan is not None and plan.header() is None):
                instances = open_instances(prepared, split, config, evaluation=evaluation)
            if isinstance(kind, FixedInstancesConfig) and kind.intra_document_masking:
                from toolkit.data.instances.index import verify_once

                verify_once(prepared, split)
            if has_mask:
                from toolkit.data.instances.targets import check_row_targets

                check_row_targets(prepared, split, instances, kind)


def _plan(
    prepared: PreparedDataset, split: Split, config: DatasetConfig, *, evaluation: bool
) -> Plan | None:
    kind, length = instances_config(config, evaluation=evaluation), config.sequence_length
    if isinstance(kind, PackedInstancesConfig):
        return packed_plan(prepared, split, length)
    if isinstance(kind, PaddedInstancesConfig):
        return padded_plan(prepared, split, length)
    if isinstance(kind, VariableInstancesConfig):
        return variable_plan(prepared, split, length, min_length=kind.min_sequence_length)
    return None
