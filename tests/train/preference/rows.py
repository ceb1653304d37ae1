"""Rows and models that both sides of the comparison with TRL are given."""

from typing import Any

import torch

VOCAB = 48
PAIRS: list[tuple[list[int], list[int], list[int]]] = [
    ([5, 9, 12], [20, 21, 22, 23, 1], [30, 31, 1]),
    ([7, 8], [24, 1], [32, 33, 34, 35, 36, 1]),
    ([11, 13, 14, 15], [25, 26, 1], [37, 1]),
    ([16], [27, 28, 29, 20, 1], [38, 39, 40, 1]),
    ([17, 18, 19], [41, 1], [42, 43, 44, 1]),
]
"""Prompt, chosen and rejected answer."""
DESIRABLE = (True, False, True, True, False)


def binary_rows() -> list[tuple[list[int], list[int], list[int], bool]]:
    """Prompt, answer, the answer of the next row, and whether the answer is desirable."""
    answers = [c if good else r for (_, c, r), good in zip(PAIRS, DESIRABLE, strict=True)]
    return [
        (PAIRS[n][0], answers[n], answers[(n + 1) % len(PAIRS)], DESIRABLE[n])
        for n in range(len(PAIRS))
    ]


def hf_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        attn_implementation="eager",
    )  # fmt: skip


def values(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """Weights by the names and shapes of `transformers`, the same in any release."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in sorted(shapes):
        drawn = torch.randn(shapes[name], generator=generator, dtype=torch.float64)
        is_norm = name.endswith("norm.weight")
        found[name] = ((1.0 + 0.05 * drawn) if is_norm else 0.3 * drawn).float()
    return found


def direction(name: str, shape: torch.Size) -> torch.Tensor:
    """What gradients are projected on: a norm does not tell where one points."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / shape.numel() ** 0.5


def fill(model: Any, seed: int) -> Any:
    made = values({n: p.shape for n, p in model.named_parameters()}, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(made[name])
    return model


def llama(seed: int) -> Any:
    from transformers import LlamaForCausalLM

    return fill(LlamaForCausalLM(hf_config()), seed)


def scored_llama() -> Any:
    from transformers import LlamaForSequenceClassification

    config = hf_config()
    config.num_labels = 1
    return fill(LlamaForSequenceClassification(config), 0)
