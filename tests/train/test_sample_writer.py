"""The sample writer needs a tokenizer, and says so before training."""

from types import SimpleNamespace

import pytest

from toolkit.errors import ConfigError
from toolkit.train.callbacks.sample_writer import SampleWriter
from toolkit.train.config import SampleWriterConfig


def test_data_without_a_tokenizer_is_refused_before_the_first_step() -> None:
    writer = SampleWriter(SampleWriterConfig(enabled=True))
    writer.trainer = SimpleNamespace(  # type: ignore[assignment]
        train_loader=SimpleNamespace(tokenizer_folder=None)
    )
    with pytest.raises(
        ConfigError, match=r"sample_writer\.enabled: the training data came without a tokenizer"
    ):
        writer.pre_train()
