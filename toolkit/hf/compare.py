"""One model twice, in `transformers` and here: names, shapes and logits compared.

The two are in memory one after the other, in fp32 whatever type the weights are kept in.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from toolkit.data.prepare.tokenizers.auto import settle
from toolkit.errors import CheckpointError, DataError
from toolkit.hf.loading import load_causal_lm, quiet_transformers, with_adapter
from toolkit.hf.source import filled_model
from toolkit.models.config import ModelConfig

TOLERANCE = 1e-4
"""Of the largest logit: what orders of summation may change in fp32."""

_ROWS, _LENGTH, _LONGEST = 2, 48, 1100


def compare_with_transformers(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    adapter: Path | None = None,
    known_ids: Sequence[int] | None = None,
    all_used: bool = True,
) -> float:
    """Load `folder` with `AutoModelForCausalLM`, running none of its own code, and compare with our
    model of `tensors`. The largest difference of two logits, as a part of the largest logit; raises
    CheckpointError: weights are missing, left over or not finite, or the logits differ.

    Args:
        tensors: (our name, whole tensor); not asked for before `transformers` is done.
        adapter: a folder whose adapter `peft` puts onto the model of `folder`.
        known_ids: ids that both models have; default: all of ours.
        all_used: weights that `transformers` has no place for are an error.
    """
    ids, where = sample_ids(config), str(adapter or folder)
    known = None if known_ids is None else torch.tensor(known_ids)
    if known is not None:
        ids = known[ids % len(known)]
    scores = config.to_transformer().num_scores is not None
    theirs = their_logits(folder, ids, all_used=all_used, adapter=adapter, scores=scores)
    ours = our_logits(config, tensors, ids, where)
    if scores:
        return check_logits(ours[:, -1:], theirs, where)
    if known is not None:
        ours, theirs = ours[..., known], theirs[..., known]
    return check_logits(ours, theirs, where)


def sample_ids(config: ModelConfig) -> Tensor:
    """`(batch, seq)` random ids, longer than the window of local attention where that is short."""
    transformer = config.to_transformer()
    window = transformer.sliding_window or 0
    length = window + _LENGTH if window + _LENGTH <= _LONGEST else _LENGTH
    shape = (_ROWS, min(length, transformer.max_sequence_length))
    return torch.randint(transformer.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def our_logits(
    config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], ids: Tensor, where: str
) -> Tensor:
    """Logits `(batch, seq, vocab)` of our model in fp32; raises CheckpointError for a weight that
    is nan or infinite."""
    model = filled_model(config, tensors)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise CheckpointError(
                f"{where}: {name} holds nan or infinite values: training diverged, or a file is "
                "damaged; take other weights"
            )
    logits: Tensor = model(ids)
    return logits


def their_logits(
    folder: Path,
    ids: Tensor,
    *,
    all_used: bool = False,
    adapter: Path | None = None,
    scores: bool = False,
) -> Tensor:
    """Logits `(batch, seq, vocab)` by `transformers` in fp32 with plain attention, or of a model
    that gives `scores` those of the last token, `(batch, 1, scores)`; see
    `compare_with_transformers`."""
    options = {"plain_attention": True, "all_used": all_used, "scores": scores}
    model = load_causal_lm(folder, dtype=torch.float32, **options)
    if adapter is not None:
        model = with_adapter(model, adapter)
    with quiet_transformers(), torch.no_grad():
        if scores:  # rows come one by one: random ids may end with the id for padding
            for config in (model.config, model.config.get_text_config()):
                config.pad_token_id = None
            return torch.cat([model(row[None], use_cache=False).logits[None] for row in ids])
        return model(ids, use_cache=False).logits


def check_logits(ours: Tensor, theirs: Tensor, where: str) -> float:
    """The largest difference of logits `(batch, seq, vocab)` in fp32, as a part of the largest.
    Raises CheckpointError where it is more than rounding, or they are not finite. Where the most
    likely ids differ, their logits must be as close as the tolerance: a tie."""
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
    """Check that `AutoTokenizer` gives our ids on text that is hard for tokenizers, and keeps the
    chat template; raises CheckpointError. See `settle`."""
    try:
        settle(folder, where=str(folder))
    except DataError as error:
        raise CheckpointError(
            f"{error} (--tokenizer), or leave all comparisons out with --no-check"
        ) from None


def bytes_to_compare(config: ModelConfig) -> int:
    """Host memory that `compare_with_transformers` takes, about: one model in fp32, and what
    loading needs besides."""
    return int(1.25 * 4 * config.num_parameters) + 500_000_000


def has_memory_to_compare(config: ModelConfig) -> bool:
    """Whether this machine has that much memory now."""
    return psutil.virtual_memory().available > bytes_to_compare(config)
