"""Rows of units: whole, side by side, numbered, and those that do not fit left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.cli import main as cli
from toolkit.data.config import (
    ByteTokenizerConfig,
    DataConfig,
    DataLoaderConfig,
    DatasetConfig,
    EvalSetConfig,
    FilesSourceConfig,
    FixedInstancesConfig,
    InstructionsConfig,
    PackedInstancesConfig,
    PaddedInstancesConfig,
    VariableInstancesConfig,
)
from toolkit.data.corpus import open_corpus
from toolkit.data.corpus_info import read_corpus
from toolkit.data.instances.open import ensure_plans, open_instances
from toolkit.data.kinds import check_data_kind
from toolkit.data.loader import get_dataloaders
from toolkit.data.order.config import MixConfig, MixSourceConfig
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.corpus import prepare_corpus
from toolkit.data.prepare.tools.inspect import inspect_path
from toolkit.data.prepare.tools.rewrite import merge_datasets, split_parts, split_validation
from toolkit.data.tokens.prepared import read_folder
from toolkit.errors import ConfigError, DataError

LENGTH = 64


def pairs(number: int, *, longest: int = 12) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n:02d}?", "chosen": "a" * (1 + n % longest), "rejected": "b" * (1 + n % 5)}
        for n in range(number)
    ]


def source(folder: Path, name: str, rows: list[dict[str, Any]]) -> FilesSourceConfig:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FilesSourceConfig(paths=[str(path)])


def dataset(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> DatasetConfig:
    changes = {
        "instructions": InstructionsConfig(kind="preference"),
        "instances": PackedInstancesConfig(),
        "validation_fraction": 0.0,
        "sequence_length": LENGTH,
        "num_processes": 1,
        **changes,
    }
    name = changes.get("dataset_name", "corpus")
    return DatasetConfig(
        root=str(folder / "data"),
        source=source(folder, name, rows),
        tokenizer=ByteTokenizerConfig(),
        **changes,
    )


def units_of(batch: dict[str, Any]) -> list[tuple[int, list[str]]]:
    """Number and documents of each unit of some rows; what the contract says of rows is checked."""
    found = []
    for row in range(len(batch["input_ids"])):
        ids, mask, documents, units = (
            np.asarray(batch[key][row])
            for key in ("input_ids", "label_mask", "document_ids", "units")
        )
        numbers = units[units >= 0].tolist()
        assert (units[len(numbers) :] == -1).all()
        assert (np.diff(documents) >= 0).all()
        assert documents.max() <= 2 * len(numbers)
        assert not mask[documents == 2 * len(numbers)].any(), "padding has a document of its own"
        for place, number in enumerate(numbers):
            sides = []
            for side in (0, 1):
                own = documents == 2 * place + side
                assert set(mask[own].tolist()) == {0, 1 + side}
                sides.append(bytes(ids[own].clip(0, 255).astype(np.uint8)).decode("latin-1"))
            found.append((number, sides))
    return found


@pytest.mark.parametrize("instances", [PackedInstancesConfig(), PaddedInstancesConfig()])
def test_batches_are_of_whole_units_with_their_numbers(tmp_path: Path, instances: Any) -> None:
    rows = pairs(40)
    config = dataset(tmp_path, rows, instances=instances)
    cfg = DataConfig(dataset=config, data_loader=DataLoaderConfig(global_batch_size=2 * LENGTH))
    train, _ = get_dataloaders(cfg)
    batch = train.global_batch(0)
    is_packed = isinstance(instances, PackedInstancesConfig)
    assert (batch["units"].shape[1] > 1) == is_packed
    assert str(batch["label_mask"].dtype) == "torch.uint8"
    loaded = units_of(batch)
    everything = units_of(train.dataset.read(np.arange(train.num_instances)))
    assert sorted(number for number, _ in everything) == list(range(40))
    assert [unit for unit in everything if unit in loaded]
    for number, (chosen, rejected) in everything:
        row = rows[number]
        assert chosen == f"{row['prompt']}{row['chosen']}\xff"
        assert rejected == f"{row['prompt']}{row['rejected']}\xff"
    # Ranks share the rows of a batch.
    ranks = [get_dataloaders(cfg, batch_rank=rank, batch_ranks=2)[0] for rank in (0, 1)]
    parts = [next(iter(rank.iterate())) for rank in ranks]
    assert [u for part in parts for u in units_of(part)] == loaded


def test_evaluation_rows_that_fill_up_hold_no_units(tmp_path: Path) -> None:
    config = dataset(tmp_path, pairs(40), validation_fraction=0.2)
    cfg = DataConfig(dataset=config, data_loader=DataLoaderConfig(global_batch_size=2 * LENGTH))
    found: list[int] = []
    for rank in range(2):
        _, evaluation = get_dataloaders(
            cfg, batch_rank=rank, batch_ranks=2, eval_batch_tokens=2 * LENGTH
        )
        for batch in evaluation["val"]:
            for row in range(len(batch["units"])):
                is_real = bool((batch["units"][row] >= 0).any())
                assert is_real == bool(batch["label_mask"][row].any())
            found += [number for number in batch["units"].flatten().tolist() if number >= 0]
    prepared = read_folder(tmp_path / "data" / "corpus" / "default")
    assert prepared is not None
    assert sorted(found) == list(range(prepared.num_units("val")))


def test_units_longer_than_a_row_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*pairs(4), {"prompt": "p", "chosen": "a" * 60, "rejected": "b"}, *pairs(2)]
    config = dataset(tmp_path, rows)
    prepared = prepare_dataset(config, progress=False)
    ensure_plans(prepared, config)
    line = "1 of 7 units is longer than a row of 64 tokens (both documents together) and left out"
    assert line in caplog.text
    instances = open_instances(prepared, "train", config)
    read = units_of(instances.read(np.arange(instances.num_instances)))
    # Numbers are those of the data, whatever rows are made of it.
    assert sorted(number for number, _ in read) == [0, 1, 2, 3, 5, 6]
    assert instances.num_units == 7
    padded = open_instances(prepared, "train", config.replace(instances=PaddedInstancesConfig()))
    assert padded.num_instances == 6
    short = config.replace(sequence_length=8)
    with pytest.raises(
        DataError, match=r"none of its 7 units fits into a row of 8 .*shortest has 10"
    ):
        ensure_plans(prepared, short)


@pytest.mark.parametrize("instances", [FixedInstancesConfig(), VariableInstancesConfig()])
def test_rows_that_would_cut_units_are_refused(tmp_path: Path, instances: Any) -> None:
    config = dataset(tmp_path, pairs(4))
    with pytest.raises(ValueError, match=r"instances of type .* cut documents.*type: packed"):
        config.replace(instances=instances)
    with pytest.raises(ValueError, match=r"eval_instances of type fixed cut documents"):
        config.replace(eval_instances=FixedInstancesConfig())
    prepared = prepare_dataset(config, progress=False)
    as_it_is = config.replace(instructions=None, source=None).replace(instances=instances)
    with pytest.raises(ConfigError, match=r"holds pairs of a chosen.*stay whole; set dataset.inst"):
        open_instances(prepared, "train", as_it_is)


def test_sources_of_a_mixture_have_units_of_one_numbering(tmp_path: Path) -> None:
    few, many = pairs(6, longest=2), pairs(30)
    base = dataset(tmp_path, few).replace(source=None)
    sources = {
        name: MixSourceConfig(ratio=0.5, source=source(tmp_path, name, rows))
        for name, rows in (("few", few), ("many", many))
    }
    mixed = base.replace(mix=MixConfig(sources=sources))
    cfg = DataConfig(dataset=mixed, data_loader=DataLoaderConfig(global_batch_size=2 * LENGTH))
    corpus = open_corpus(cfg, prepare_corpus(cfg, progress=False))
    rows = units_of(corpus.train.read(np.arange(corpus.train.num_instances)))
    assert sorted(number for number, _ in rows) == list(range(36))
    wanted = [f"{row['prompt']}{row['chosen']}\xff" for row in few + many]
    assert all(sides[0] == wanted[number] for number, sides in rows)
    text = source(tmp_path, "text", [{"prompt": "p", "completion": "c"}])
    plain = MixSourceConfig(ratio=1.0, source=text, instructions=InstructionsConfig())
    other = base.replace(mix=MixConfig(sources={**sources, "plain": plain}))
    line = "few holds pairs of a chosen and a rejected answer, plain text or conversations"
    with pytest.raises(ConfigError, match=line):
        prepare_corpus(cfg.replace(dataset=other), progress=False)


def test_data_of_another_kind_than_trained_is_refused_in_one_line(tmp_path: Path) -> None:
    text = EvalSetConfig(source=source(tmp_path, "text", [{"text": "hello " * 40}]))
    config = dataset(tmp_path, pairs(12))
    cfg = DataConfig(dataset=config, data_loader=DataLoaderConfig(global_batch_size=LENGTH))
    prepare_corpus(cfg, progress=False)
    for info in (None, read_corpus(cfg)):
        check_data_kind(cfg, "pair", trains="dpo", info=info)
        with pytest.raises(ConfigError, match=r"transformer needs text or conv.*holds pairs.*dpo,"):
            check_data_kind(cfg, None, trains="train_module.type transformer", info=info)
        with pytest.raises(ConfigError, match=r"kto needs completions with a label, and .*pairs"):
            check_data_kind(cfg, "binary", trains="kto", info=info)
    with_text = cfg.replace(dataset=config.replace(eval_sets={"web": text}))
    with pytest.raises(ConfigError, match=r"eval_sets.web holds text or conv.*; give it rows"):
        check_data_kind(with_text, "pair", trains="dpo")
    with pytest.raises(ConfigError, match=r"eval_sets.web: the training data and web do not go"):
        prepare_corpus(with_text, progress=False)


def test_inspect_shows_and_checks_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataset(tmp_path, pairs(8))
    folder = prepare_dataset(config, progress=False).folder
    assert cli.run(["data", "inspect", str(folder), "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert "every two documents are a unit (pair)" in shown
    assert "train, unit 0, chosen, document 0 (5 tokens):\n    00?a" in shown
    assert "train, unit 0, rejected, document 1 (5 tokens):\n    00?b" in shown
    path = folder / "train.mask"
    mask = bytearray(path.read_bytes())
    mask[3], mask[4] = 2, 2
    path.write_bytes(mask)
    problems = inspect_path(folder, progress=False).problems
    assert any("1 of 8 units do not have one prompt with two answers" in line for line in problems)


def test_show_prints_both_sides_of_a_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataset(tmp_path, pairs(8), instances=PaddedInstancesConfig()).to_dict()
    model = {"preset": "quickstart"}
    (tmp_path / "pairs.json").write_text(json.dumps({"model": model, "dataset": config}))
    assert cli.run(["data", "show", "pairs.json", "-n", "1", "--start", "2"]) == 0
    shown = capsys.readouterr().out
    assert "pair 2, chosen (document 4), tokens 0 to 6 of 7\n    02?[[aaa" in shown
    assert "pair 2, rejected (document 5), tokens 0 to 6 of 7\n    02?[[bbb" in shown


def test_merging_and_splitting_keep_units_together(tmp_path: Path) -> None:
    first = prepare_dataset(dataset(tmp_path, pairs(9)), progress=False)
    second = prepare_dataset(dataset(tmp_path, pairs(4), dataset_name="two"), progress=False)
    whole = merge_datasets([first.folder, second.folder], tmp_path / "whole", progress=False)
    assert (whole.unit, whole.num_units("train")) == ("pair", 13)
    made = [whole]
    made.append(split_validation(whole.folder, tmp_path / "held", 0.4, progress=False))
    made += split_parts(whole.folder, tmp_path / "parts", 3, progress=False)
    for prepared in made:
        assert inspect_path(prepared.folder, progress=False).problems == []
    assert [one.num_units("train") + one.num_units("val") for one in made[:2]] == [13, 13]
    assert sum(part.num_units("train") for part in made[2:]) == 13
    conversations = dataset(tmp_path, [{"prompt": "a", "completion": "b"}] * 4, dataset_name="sft")
    conversations = conversations.replace(instructions=InstructionsConfig())
    other = prepare_dataset(conversations, progress=False)
    manifest = json.loads((other.folder / "dataset.json").read_text())
    assert "unit" not in manifest, "the files of other data stay what they were"
    assert "kind" not in manifest["settings"]["instructions"]
    with pytest.raises(DataError, match=r"differ in what they hold \(pairs of a chosen"):
        merge_datasets([first.folder, other.folder], tmp_path / "both", progress=False)
