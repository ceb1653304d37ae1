"""The sample writer needs a tokenizer, and says so before training."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from toolkit.data.config import HFTokenizerConfig
from toolkit.data.prepare.tokenizers.choice import load_hf_tokenizer
from toolkit.data.prepare.tokenizers.tokenizer import EOS_TOKEN, ByteTokenizer
from toolkit.errors import ConfigError
from toolkit.evaluate.sample_writer import SampleWriter
from toolkit.train.callbacks.config import SampleWriterConfig


def test_data_without_a_tokenizer_is_refused_before_the_first_step() -> None:
    writer = SampleWriter(SampleWriterConfig(enabled=True))
    writer.state = SimpleNamespace(  # type: ignore[assignment]
        train_loader=SimpleNamespace(tokenizer_folder=None)
    )
    with pytest.raises(
        ConfigError, match=r"sample_writer\.enabled: the training data came without a tokenizer"
    ):
        writer.pre_train()


@pytest.mark.parametrize(("prepend_bos", "prompt", "first"), [
    (True, "ab", [256, 97, 98]), (True, "", [256]), (False, "ab", [97, 98]), (False, "", [256]),
])  # fmt: skip
def test_the_prompt_starts_as_documents_of_the_data_do(
    prepend_bos: bool, prompt: str, first: list[int], tmp_path: Path
) -> None:
    ByteTokenizer().save(tmp_path / "bytes")
    (tmp_path / "bytes" / "tokenizer_config.json").unlink()
    config = HFTokenizerConfig(
        path=str(tmp_path / "bytes"), eos_token=EOS_TOKEN, bos_token=EOS_TOKEN
    )
    load_hf_tokenizer(config).with_bos_policy(prepend_bos).save(tmp_path / "tokenizer")
    seen: list[list[int]] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return torch.zeros(*ids.shape, 257)

    writer = SampleWriter(
        SampleWriterConfig(enabled=True, prompt=prompt, max_new_tokens=1, temperature=0)
    )
    writer.state = SimpleNamespace(  # type: ignore[assignment]
        train_loader=SimpleNamespace(tokenizer_folder=tmp_path / "tokenizer", sequence_length=8),
        train_module=SimpleNamespace(logits=logits, evaluating=contextlib.nullcontext),
        stop_request=SimpleNamespace(is_agreed=False),
        environment=SimpleNamespace(seed=0, device="cpu", broadcast=None),
        is_main=False,
    )
    writer.post_train()
    assert seen == [first]
