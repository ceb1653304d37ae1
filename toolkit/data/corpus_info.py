"""What training data there is, told from manifests in a millisecond; nothing here writes."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from toolkit.data.config import (
    DataConfig,
    DatasetConfig,
    MixSourceConfig,
    SourceConfig,
    VariableInstancesConfig,
)
from toolkit.data.instances.open import count_rows, instances_config
from toolkit.data.order.plan import Batches, BatchPlan, Segment
from toolkit.data.order.resolve import limited_instances, resolve_mix
from toolkit.data.tokens.prepared import (
    PreparedDataset,
    Split,
    dataset_folder,
    localize,
    open_prepared,
    read_prepared,
)
from toolkit.data.tokens.units import name_of
from toolkit.errors import ConfigError, ErrorList, renaming

VAL = "val"
"""Name of the evaluation on the one validation split there is."""
NO_EPOCHS = "the data does not say how long an epoch is; use steps or tokens"
FAR = 1 << 62
"""Instances of an epoch whose length is not known."""


class CorpusInfo(NamedTuple):
    """What is known of training data without opening it."""

    parts: dict[str, tuple[DatasetConfig, PreparedDataset]]
    """Token files by the name of their source in the mixture, or under "" where there is one
    corpus; none of a custom data set."""
    rows: list[tuple[int, int]] | None
    """(length in tokens, number) of the training rows of one pass; None: not known yet."""
    instances: dict[str, int]
    """Training instances of each part, where they are known."""
    vocab_size: int | None
    """Every id is below this; None where a custom data set does not say."""
    where: str
    """For messages: the folder, or what stands for it."""
    eval_parts: dict[str, tuple[DatasetConfig, PreparedDataset]] = {}  # noqa: RUF012
    """Token files of `dataset.eval_sets` by name; all documents are in their training split."""
    is_ready: bool = False
    """Whether all plans of rows are made, and the sources of a mixture have the same tokens."""

    def num_tokens(self, split: Split) -> int:
        """Tokens of the split in all parts."""
        return sum(prepared.num_tokens(split) for _, prepared in self.parts.values())

    def epoch_instances(self, config: DataConfig) -> int | None:
        """Instances of one pass; None: not known yet. Rows of variable length count as those of
        whole batches: as many as there are batches of rows of `dataset.sequence_length`."""
        if self.rows is None:
            return None
        if isinstance(config.dataset.instances, VariableInstancesConfig):
            tokens, per_batch = config.data_loader.first_batch_size, config.phases[0]
            batches = sum(number // max(1, tokens // length) for length, number in self.rows)
            return batches * per_batch.batch_instances
        return sum(number for _, number in self.rows)


def planned_batches(config: DataConfig, epoch_instances: int | None) -> Batches:
    """The batches of a run from its beginning; `epoch_instances` as `CorpusInfo` has them."""
    plan = BatchPlan(
        [Segment(0, 0, 1)],
        # Batches of a mixture go across passes.
        epoch_instances=epoch_instances or FAR,
        keeps_epochs_apart=config.dataset.mix is None,
    )
    plan = plan.continued((), 0, config.phases)
    unknown = None
    if not epoch_instances:
        unknown = "epochs need prepared data; run `toolkit prepare` first"
        if config.dataset.custom is not None:
            unknown = NO_EPOCHS
    return Batches(plan, config.dataset.sequence_length, no_epochs=unknown)


def check_batch_schedules(config: DataConfig) -> None:
    """Check that the schedules of batch size and row length suit the kind of data. Raises
    ConfigError."""
    loader, dataset, found = config.data_loader, config.dataset, ErrorList()
    kind = dataset.instances.to_dict()["type"] if dataset.custom is None else "custom"
    if loader.batch_size_schedule and kind == "variable":
        found.add(
            ConfigError(
                "the order of dataset.instances of type variable is made for one batch size; leave "
                "it out, or use instances of type fixed, packed or padded",
                key="data_loader.batch_size_schedule",
            )
        )
    if loader.sequence_length_schedule and kind != "fixed":
        why = {
            "variable": "rows of type variable have lengths of their own (curriculum)",
            "custom": "a data set written in Python makes its own rows",
        }.get(kind, f"rows of type {kind} hold whole documents, which this would cut")
        found.add(
            ConfigError(
                f"{why}; leave it out, or use dataset.instances of type fixed",
                key="data_loader.sequence_length_schedule",
            )
        )
    longest = dataset.sequence_length
    for number, (_, length) in enumerate(loader.sequence_lengths(longest)):
        if length < 2 or longest % length:
            index = number - (loader.sequence_length_schedule[0].tokens > 0)
            below = next((n for n in range(min(length, longest), 1, -1) if longest % n == 0), None)
            above = next((n for n in range(length + 1, longest + 1) if longest % n == 0), None)
            nearest = " or ".join(str(n) for n in (below, above) if n)
            found.add(
                ConfigError(
                    f"{length} does not divide dataset.sequence_length {longest}; nearest that "
                    f"work: {nearest}",
                    key=f"data_loader.sequence_length_schedule.{index}.sequence_length",
                )
            )
    found.raise_any()


def read_corpus(cfg: DataConfig, *, in_use: bool = False) -> CorpusInfo | None:
    """What there is already; None when token files are missing. `in_use` marks its folders as used
    for as long as the result lives.

    Raises:
        ConfigError, DataError: what is there is damaged, or the mixture makes no sense.
    """
    if cfg.dataset.custom is not None:
        return custom_info(cfg)
    parts: dict[str, tuple[DatasetConfig, PreparedDataset]] = {}
    eval_parts = dict(parts)
    for found, configs in ((parts, datasets_of(cfg)), (eval_parts, eval_sets_of(cfg))):
        for name, config in configs.items():
            prepared = open_prepared(config) if in_use else read_prepared(config)
            if prepared is None:
                return None
            found[name] = (config, prepared)
    return corpus_info(cfg, parts)._replace(eval_parts=eval_parts)


def check_same_tokens(
    sources: Mapping[str, PreparedDataset], *, key: str = "dataset.mix", verb: str = "mix"
) -> None:
    """Raise ConfigError when an id does not mean the same in all sources, or documents do not begin
    and end alike."""
    (first_name, first), *others = sources.items()
    for name, prepared in others:
        if prepared.unit != first.unit:
            raise ConfigError(
                f"{key}: {first_name} and {name} do not {verb}: {first.folder} holds "
                f"{name_of(first.unit)}, {prepared.folder} {name_of(prepared.unit)}; give all of "
                "them rows of one kind (instructions.kind)"
            )
        for what, field in (
            ("their tokenizers", "tokenizer_fingerprint"),
            ("their end-of-document ids", "eos_id"),
            ("whether documents end with it (append_eos)", "append_eos"),
            ("whether documents start with a token of their own (prepend_bos)", "prepend_bos"),
        ):
            one, two = getattr(first.manifest, field), getattr(prepared.manifest, field)
            if one != two:
                raise ConfigError(
                    f"{key}: {first_name} and {name} do not {verb}: {what} differ "
                    f"({one} in {first.folder}, {two} in {prepared.folder}); prepare one of "
                    "them again under another dataset_config"
                )


def check_eval_sets(info: CorpusInfo) -> None:
    """Raise ConfigError when an id of an evaluation set does not mean what it means in training."""
    for first_name, (_, first) in [*info.parts.items()][:1]:
        for name, (_, prepared) in info.eval_parts.items():
            pair = {first_name or "the training data": first, name: prepared}
            check_same_tokens(pair, key=f"dataset.eval_sets.{name}", verb="go together")


def data_places(cfg: DataConfig) -> list[Path]:
    """Folders where the token files of `cfg` are, or will be."""
    datasets = [*datasets_of(cfg).values(), *eval_sets_of(cfg).values()]
    return [dataset_folder(dataset) for dataset in datasets]


def datasets_of(cfg: DataConfig) -> dict[str, DatasetConfig]:
    """The corpora of token files that `cfg` trains on, by name: those of a mixture, one named "",
    or none."""
    if cfg.dataset.custom is not None:
        return {}
    dataset = localize(cfg.dataset, cfg.store)
    if dataset.mix is None:
        return {"": dataset}
    return {source.name: source.dataset for source in resolve_mix(dataset)}


def eval_sets_of(cfg: DataConfig) -> dict[str, DatasetConfig]:
    """The corpora of token files that `cfg` only evaluates, by name. Each is a corpus by itself of
    which nothing is held out, with rows as evaluations have them. ConfigError: a name or a folder
    is that of training data, or of another set."""
    if not cfg.dataset.eval_sets:
        return {}
    dataset, trained = localize(cfg.dataset, cfg.store), datasets_of(cfg)
    folders = {dataset_folder(config): name or "training" for name, config in trained.items()}
    found: dict[str, DatasetConfig] = {}
    for name, one in dataset.eval_sets.items():
        key = f"dataset.eval_sets.{name}"
        if name and name in trained:
            raise ConfigError("a source of the mixture has this name; choose another one", key=key)
        try:
            found[name] = dataset.replace(
                source=one.source,
                mix=None,
                eval_sets={},
                dataset_name=one.dataset_name or name,
                dataset_config=one.dataset_config or dataset.dataset_config,
                instructions=one.instructions,
                filters=None,
                deduplicate=False,
                validation_fraction=0.0,
                instances=instances_config(dataset, evaluation=True),
                eval_instances=None,
            )
        except ValueError as error:  # a name that is no folder's
            raise ConfigError(str(error), key=key) from None
        folder = dataset_folder(found[name])
        if folder in folders:
            raise ConfigError(
                f"its token files would be in {folder}, like those of {folders[folder]}; give it a "
                "dataset_name",
                key=key,
            )
        folders[folder] = name
    return found


def source_settings(name: str) -> AbstractContextManager[None]:
    """Errors of the block, which prepares or looks at the source `name` of a mixture by itself, say
    where its settings are; "" is the only source."""
    place = "dataset.mix.sources." + name.replace("/", ".mix.") if name else "dataset"
    return renaming(r"\bdataset\.(source|dataset_name|dataset_config)\b", rf"{place}.\1")


def eval_set_settings(name: str) -> AbstractContextManager[None]:
    """The same of one of `dataset.eval_sets`."""
    fields = r"\bdataset\.(source|instructions|dataset_name|dataset_config)\b"
    return renaming(fields, rf"dataset.eval_sets.{name}.\1")


ChangeSource = Callable[[SourceConfig | None], SourceConfig | None]


def without_sources(dataset: DatasetConfig) -> DatasetConfig:
    """`dataset` that takes token files as they are, wherever their text is now."""
    return with_sources(dataset, lambda source: None)


def with_sources(dataset: DatasetConfig, change: ChangeSource) -> DatasetConfig:
    """`dataset` with what `change` makes of every source."""

    def changed(sources: dict[str, MixSourceConfig]) -> dict[str, MixSourceConfig]:
        return {
            name: source.replace(mix=changed(source.mix))
            if isinstance(source.mix, dict)
            else source.replace(source=change(source.source))
            for name, source in sources.items()
        }

    if dataset.eval_sets:
        sets = {
            name: one.replace(source=change(one.source)) for name, one in dataset.eval_sets.items()
        }
        dataset = dataset.replace(eval_sets=sets)
    if dataset.mix is None:
        return dataset.replace(source=change(dataset.source))
    return dataset.replace(mix=dataset.mix.replace(sources=changed(dataset.mix.sources)))


def corpus_info(
    cfg: DataConfig, parts: dict[str, tuple[DatasetConfig, PreparedDataset]]
) -> CorpusInfo:
    """Of token files by the name of their source, "" where there is no mixture."""
    rows = {
        name: count_rows(prepared, "train", config) for name, (config, prepared) in parts.items()
    }
    known = {name: found for name, found in rows.items() if found is not None}
    instances = {name: sum(number for _, number in found) for name, found in known.items()}
    total = None
    if len(known) == len(parts):
        total = [row for found in known.values() for row in found]
        if cfg.dataset.mix is not None:
            total = [(cfg.dataset.sequence_length, limited_instances(cfg.dataset, instances))]
    folders = [str(prepared.folder) for _, prepared in parts.values()]
    where = folders[0] if len(folders) == 1 else f"mixture of {', '.join(parts)}"
    vocab_size = max(prepared.vocab_size for _, prepared in parts.values())
    return CorpusInfo(parts, total, instances, vocab_size, where)


def custom_info(cfg: DataConfig) -> CorpusInfo:
    """Of a data set written in Python."""
    from toolkit.data.instances.custom import UNKNOWN_LENGTH, open_custom

    assert cfg.dataset.custom is not None
    instances = open_custom(cfg.dataset.custom, "train", cfg.dataset.sequence_length)
    assert instances is not None
    number = instances.num_instances
    rows = [(cfg.dataset.sequence_length, number)] if number != UNKNOWN_LENGTH else None
    return CorpusInfo({}, rows, {}, instances.vocab_size, cfg.dataset.custom.target)
