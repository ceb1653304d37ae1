"""Sampling text from a model: short samples, no key/value cache."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import CheckpointError, ConfigError


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
    max_sequence_length: int | None = None,
    device: torch.device | str | None = None,
    broadcast: Callable[[int], int] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue `prompt_ids`; the new ids only, `eos_id` (which ends it; one of several) included.

    Choices are drawn on the CPU from fp32 logits and `seed`. Under engines that shard the model,
    all ranks call this together with the same arguments and a `broadcast`: logits need not be
    bit-equal on all of them, but the number of forwards must be. Raises ConfigError for an empty
    prompt or a setting out of range, CheckpointError where the model's logits are no numbers.

    Args:
        model: the last `max_sequence_length` ids, `(batch, seq)`, to logits `(batch, seq, vocab)`.
        prompt_ids: at least one; `Tokenizer.prompt_ids` starts them as the data's documents start.
        temperature: divides the logits; 0 takes the most likely id.
        top_k: draw among this many most likely ids; None or 0: among all.
        top_p: of these, draw among the fewest most likely ids whose probabilities reach this sum
            (Holtzman et al. 2020, nucleus sampling); None or 1: among all.
        max_sequence_length: window; default: `model.config.max_sequence_length`.
        device: of the ids; default: that of the model's parameters.
        broadcast: gives rank 0's choice on every rank; default: one process.
        on_token: called with each new id as soon as it is chosen.
    """
    if not prompt_ids:
        raise ConfigError("prompt: empty; give some text, or start from the end-of-document token")
    if temperature < 0 or (top_k is not None and top_k < 0) or max_new_tokens < 0:
        raise ConfigError(
            f"temperature {temperature}, top_k {top_k}, max_new_tokens {max_new_tokens}: "
            "none of them can be negative"
        )
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p {top_p}: give a sum of probabilities, above 0 and up to 1")
    config: Any = getattr(getattr(model, "module", model), "config", None)
    window = max_sequence_length or getattr(config, "max_sequence_length", None)
    if window is None:
        raise ConfigError("max_sequence_length: needed, as this model tells no longest sequence")
    module = model if isinstance(model, nn.Module) else None
    was_training = module is not None and module.training
    if module is not None:
        device = device or next(module.parameters()).device
        module.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    ends = eos_id if isinstance(eos_id, Collection) else (eos_id,)
    try:
        # Every forward has another length; a compiled model would be compiled again for each.
        with torch.compiler.set_stance("force_eager"):
            while len(ids) < len(prompt_ids) + max_new_tokens:
                logits = model(torch.tensor([ids[-window:]], device=device))[0, -1].float().cpu()
                check_logits(logits)
                choice = _choose(logits, temperature, top_k, top_p, generator)
                ids.append(broadcast(choice) if broadcast is not None else choice)
                if on_token is not None:
                    on_token(ids[-1])
                if ids[-1] in ends:
                    break
    finally:
        if module is not None:
            module.train(was_training)
    return ids[len(prompt_ids) :]


def check_logits(logits: Tensor) -> None:
    """Raise CheckpointError where nothing can be drawn from `logits`, or only a meaningless id."""
    if not torch.isfinite(logits.amax()):
        raise CheckpointError(
            "the model's logits are nan or infinite: training diverged, or its weights are "
            "damaged; take another checkpoint"
        )


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    candidates = None
    if top_k and top_k < logits.numel():
        logits, candidates = logits.topk(top_k)
    probabilities = torch.softmax(logits / temperature, 0)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # Those that the more likely ones do not already add up to; the first always stays.
        kept = ordered.cumsum(0) - ordered < top_p
        probabilities = ordered * kept
        candidates = order if candidates is None else candidates[order]
    choice = int(torch.multinomial(probabilities, 1, generator=generator))
    return choice if candidates is None else int(candidates[choice])
