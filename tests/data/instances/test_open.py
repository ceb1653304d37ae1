import subprocess
import sys

import numpy as np
import pytest

from tests.data.instances.token_corpus import numbered_documents, write_documents
from toolkit.data.config import (
    DatasetConfig,
    FixedInstancesConfig,
    PackedInstancesConfig,
    PaddedInstancesConfig,
    VariableInstancesConfig,
)
from toolkit.data.instances.fixed import TokenDataset
from toolkit.data.instances.open import count_instances, ensure_plans, open_instances
from toolkit.data.instances.packed import PackedDataset
from toolkit.data.instances.planned import PaddedDataset
from toolkit.data.instances.variable import VariableDataset
from toolkit.data.tokens.prepared import PreparedDataset

KINDS = {
    TokenDataset: FixedInstancesConfig(),
    PackedDataset: PackedInstancesConfig(),
    PaddedDataset: PaddedInstancesConfig(),
    VariableDataset: VariableInstancesConfig(min_sequence_length=4),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[DatasetConfig, PreparedDataset]:
    root = tmp_path_factory.mktemp("open")
    config = DatasetConfig(root=str(root), sequence_length=32)
    folder = root / "corpus" / "default"
    write_documents(folder, numbered_documents([n % 37 for n in range(200)]))
    prepared = write_documents(folder, numbered_documents([50, 20, 30]), split="val")
    return config, prepared


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_opened_counted_and_told_apart(
    corpus: tuple[DatasetConfig, PreparedDataset], kind: type
) -> None:
    config, prepared = corpus
    config = config.replace(instances=KINDS[kind])
    dataset = open_instances(prepared, "train", config)
    assert type(dataset) is kind
    assert dataset.num_instances == count_instances(prepared, "train", config) > 0
    assert dataset.bytes_per_token == prepared.bytes_per_token("train") > 0
    others = [
        open_instances(prepared, "train", config.replace(instances=k)) for k in KINDS.values()
    ]
    assert sum(other.fingerprint == dataset.fingerprint for other in others) == 1
    assert dataset.read(np.array([dataset.num_instances - 1]))["input_ids"].shape == (1, 32)


@pytest.mark.parametrize(
    ("training", "evaluation", "expected"),
    [
        (PackedInstancesConfig(), None, PackedDataset),
        (VariableInstancesConfig(min_sequence_length=4), None, TokenDataset),
        (FixedInstancesConfig(), PaddedInstancesConfig(), PaddedDataset),
    ],
)
def test_evaluation_has_a_kind_of_its_own_or_that_of_training(
    corpus: tuple[DatasetConfig, PreparedDataset], training, evaluation, expected: type
) -> None:
    config, prepared = corpus
    config = config.replace(instances=training, eval_instances=evaluation)
    assert type(open_instances(prepared, "val", config, evaluation=True)) is expected


def test_plans_of_both_splits_are_made_before_they_are_needed(
    corpus: tuple[DatasetConfig, PreparedDataset],
) -> None:
    config, prepared = corpus
    config = config.replace(
        sequence_length=64,
        instances=PackedInstancesConfig(),
        eval_instances=PaddedInstancesConfig(),
    )
    assert count_instances(prepared, "train", config) is None
    assert count_instances(prepared, "val", config, evaluation=True) is None
    ensure_plans(prepared, config)
    counted = count_instances(prepared, "val", config, evaluation=True)
    assert counted == open_instances(prepared, "val", config, evaluation=True).num_instances
    assert count_instances(prepared, "train", config) > 0


def test_counting_imports_neither_torch_nor_numpy(
    corpus: tuple[DatasetConfig, PreparedDataset],
) -> None:
    config, prepared = corpus
    config = config.replace(instances=PackedInstancesConfig())
    expected = open_instances(prepared, "train", config).num_instances
    code = (
        "import sys\n"
        "from toolkit.data.config import DatasetConfig, PackedInstancesConfig\n"
        "from toolkit.data.instances.open import count_instances\n"
        "from toolkit.data.tokens.prepared import read_prepared\n"
        f"config = DatasetConfig(root={config.root!r}, sequence_length=32, "
        "instances=PackedInstancesConfig())\n"
        "print(count_instances(read_prepared(config), 'train', config))\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == f"{expected}\n[]\n", answer.stderr
