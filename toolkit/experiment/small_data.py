"""Sizes of batches that work where there is less data than one batch needs."""

from toolkit.data.order.plan import batch_that_fits
from toolkit.experiment.config import ExperimentConfig


def sizes_that_fit(config: ExperimentConfig, instances: int, ranks: int) -> list[str]:
    """Flags with which `instances` of `dataset.sequence_length` tokens are at least one batch over
    `ranks` data-parallel ranks; empty where none are known: no instances, rows of several lengths
    or pipelines, whose microbatches have rules of their own."""
    module, loader = config.train_module, config.data_loader
    length, kind = config.dataset.sequence_length, config.dataset.instances.to_dict()["type"]
    if not instances or kind == "variable" or loader.sequence_length_schedule:
        return []
    if module.pp_config is not None:
        return []
    flags = []
    if instances < ranks:
        # Shorter rows are more: a power of two, of which there are as many as ranks.
        shorter = instances * length // ranks
        if kind != "fixed" or shorter < 2:
            return []
        length = 1 << (shorter.bit_length() - 1)
        instances = ranks
        flags.append(f"--dataset.sequence_length={length}")
    rows = 1
    if module.rank_microbatch_size is not None:
        rows = max(1, min(instances // ranks, module.rank_microbatch_size // length))
    batch = batch_that_fits(instances, length, ranks, rows)
    flags.append(f"--data_loader.global_batch_size={batch}")
    if module.rank_microbatch_size not in (None, rows * length):
        flags.append(f"--train_module.rank_microbatch_size={rows * length}")
    if loader.batch_size_schedule:
        flags.append("--data_loader.batch_size_schedule=[]")
    return flags
