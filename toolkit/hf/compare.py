"""One model twice, in `transformers` and here: names, shapes and logits compared.

The two are in memory one after the other, in fp32 whatever type the weights are kept in.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from toolkit.data.tokenizers.tokenizer import load_tokenizer
from toolkit.errors import CheckpointError, DataError
from toolkit.hf.loading import load_auto_tokenizer, load_causal_lm, quiet_transformers
from toolkit.hf.source import filled_model
from toolkit.models.config import ModelConfig

TOLERANCE = 1e-4
"""Of the largest logit: what orders of summation may change in fp32."""

_ROWS, _LENGTH, _LONGEST = 2, 48, 1100
_TEXT = "The year 2024, naïve café: x += 1;\n\tdef f(a, b):  return a*b  # 你好 🙂"


def compare_with_transformers(
    folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]
) -> float:
    """Load `folder` with `AutoModelForCausalLM` and compare with our model of `tensors`.

    Args:
        folder: config.json and weights; none of its own code is run.
        config: of our model.
        tensors: (our name, whole tensor); not asked for before `transformers` is done.

    Returns:
        The largest difference of two logits, as a part of the largest logit.

    Raises:
        CheckpointError: weights are missing or left over, or the logits differ.
    """
    ids = sample_ids(config)
    theirs = their_logits(folder, ids)
    model = filled_model(config, tensors)
    with torch.no_grad():
        ours = model(ids)
    return check_logits(ours, theirs, str(folder))


def sample_ids(config: ModelConfig) -> Tensor:
    """`(batch, seq)` random ids, longer than the window of local attention where that is short."""
    transformer = config.to_transformer()
    window = transformer.sliding_window or 0
    length = window + _LENGTH if window + _LENGTH <= _LONGEST else _LENGTH
    shape = (_ROWS, min(length, transformer.max_sequence_length))
    return torch.randint(transformer.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def their_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits `(batch, seq, vocab)` by `transformers` in fp32 with plain attention.

    Raises:
        CheckpointError: it cannot load the folder, or misses weights or finds others than its own.
    """
    model = load_causal_lm(folder, dtype=torch.float32, for_comparison=True)
    with quiet_transformers(), torch.no_grad():
        return model(ids, use_cache=False).logits


def check_logits(ours: Tensor, theirs: Tensor, where: str) -> float:
    """Check that logits `(batch, seq, vocab)` in fp32 are the same but for rounding.

    Where the most likely ids differ, their logits must be as close as the tolerance: a tie.

    Returns:
        The largest difference, as a part of the largest logit.

    Raises:
        CheckpointError: they differ, or are not finite.
    """
    scale = ours.abs().max().item()
    difference = (ours - theirs).abs().max().item()
    most_likely = ours.gather(-1, theirs.argmax(-1, keepdim=True)).squeeze(-1)
    behind = (ours.amax(-1) - most_likely).max().item()
    limit = TOLERANCE * scale
    # Written so that nan fails.
    if not (difference <= limit and behind <= limit):
        raise CheckpointError(
            f"{where}: the logits of transformers differ by {difference:.3g} where the largest is "
            f"{scale:.3g} (allowed: {limit:.3g}); this is a fault of the mapping or of the weights"
        )
    return difference / scale if scale else 0.0


def check_tokenizer(folder: Path) -> None:
    """Check that `AutoTokenizer` gives our ids on sample text, and keeps the chat template.

    Raises:
        CheckpointError: it cannot load the folder, or does otherwise.
    """
    ours = load_tokenizer(folder)
    try:
        theirs = load_auto_tokenizer(folder)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    for text in (_TEXT, *_TEXT.split()):
        expected = ours.encode_batch([text])[0].tolist()
        found = theirs(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            raise CheckpointError(
                f"{folder}: AutoTokenizer makes {found[:8]} of {text[:20]!r}, the training data "
                f"has {expected[:8]}; leave the comparison out with --no-check"
            )
    template = theirs.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if ours.chat_template is not None and template != ours.chat_template:
        raise CheckpointError(f"{folder}: AutoTokenizer does not keep the chat template")


def bytes_to_compare(config: ModelConfig) -> int:
    """Host memory that `compare_with_transformers` takes, about: one model in fp32, and what
    loading needs besides."""
    return int(1.25 * 4 * config.num_parameters) + 500_000_000


def has_memory_to_compare(config: ModelConfig) -> bool:
    """Whether this machine has that much memory now."""
    import psutil

    return psutil.virtual_memory().available > bytes_to_compare(config)
