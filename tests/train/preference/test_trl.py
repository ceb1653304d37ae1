"""Losses and gradients equal those of TRL 1.16.0 (`make_trl.py`) on the same weights and rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import module_config, open_environment
from tests.train.preference.rows import PAIRS, VOCAB, binary_rows, direction, values
from toolkit.hf.families.llama import LLAMA
from toolkit.hf.family import Rule
from toolkit.models.config import TransformerConfig
from toolkit.models.init import canonical_parameters
from toolkit.models.parameters import parameter_shapes
from toolkit.train.preference.config import (
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
    SimPOConfig,
)
from toolkit.train.preference.documents import document_sums

NUMBERS = json.loads(Path(__file__).with_name("trl_numbers.json").read_text())
OBJECTIVES: dict[str, Any] = {
    "dpo_sigmoid": DPOConfig(beta=0.3),
    "dpo_ipo": DPOConfig(loss="ipo", beta=0.3),
    "dpo_length_normalised": DPOConfig(loss="length_normalised", beta=5.0),
    "kto": KTOConfig(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7),
    "orpo": ORPOConfig(beta=0.3),
    "simpo": SimPOConfig(beta=2.0, gamma=0.8),
    "reward": RewardConfig(centering=0.1),
}
SEQ = 32


def model_config(name: str) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=VOCAB, vocab_multiple=1, d_model=32, num_layers=2, num_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_sequence_length=64, norm_eps=1e-6,
        num_scores=1 if name == "reward" else None,
    )  # fmt: skip


def rules_of(config: TransformerConfig) -> dict[str, Rule]:
    return {rule.theirs[0]: rule for rule in LLAMA.rules(config)}


def give_weights(module: Any, config: TransformerConfig, seed: int) -> None:
    rules, shapes = rules_of(config), parameter_shapes(config)
    made = values({name: torch.Size(shapes[r.ours[0]]) for name, r in rules.items()}, seed)
    parameters = canonical_parameters(module.engine.module)
    with torch.no_grad():
        for name, rule in rules.items():
            parameters[rule.ours[0]].copy_(made[name])


def packed(unit: str) -> dict[str, torch.Tensor]:
    """The rows as units, one after the other in rows of `SEQ` tokens."""
    if unit == "pair":
        units = [[(p, c, 1), (p, r, 2)] for p, c, r in PAIRS]
    else:
        units = [[(p, c, 1 if good else 2), (p, k, 3)] for p, c, k, good in binary_rows()]
    rows: list[list[int]] = [[]]
    used = 0
    for number, unit_documents in enumerate(units):
        size = sum(len(p) + len(a) for p, a, _ in unit_documents)
        if used + size > SEQ:
            rows.append([])
            used = 0
        rows[-1].append(number)
        used += size
    ids = torch.zeros(len(rows), SEQ, dtype=torch.int64)
    mask = torch.zeros(len(rows), SEQ, dtype=torch.uint8)
    documents = torch.zeros(len(rows), SEQ, dtype=torch.int32)
    numbers = torch.full((len(rows), max(map(len, rows))), -1, dtype=torch.int64)
    for row, own in enumerate(rows):
        place = 0
        for k, number in enumerate(own):
            numbers[row, k] = number
            for side, (prompt, answer, kind) in enumerate(units[number]):
                end = place + len(prompt) + len(answer)
                ids[row, place:end] = torch.tensor(prompt + answer)
                mask[row, place + len(prompt) : end] = kind
                documents[row, place:end] = 2 * k + side
                place = end
        documents[row, place:] = 2 * len(own)
    return {"input_ids": ids, "label_mask": mask, "document_ids": documents, "units": numbers}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_losses_and_gradients_equal_those_of_trl(name: str) -> None:
    objective, model = OBJECTIVES[name], model_config(name)
    config = module_config(objective=objective, rank_microbatch_size=SEQ)  # a row at a time
    module = config.build(model.build(init_device="meta"), environment=open_environment(config))
    batch = packed(objective.unit)
    if name.startswith(("dpo", "kto")):
        give_weights(module, model, 1)
        rows = module.unit_batch_of(batch)
        sums = document_sums(module._no_grad_values(rows).values * (rows.kinds > 0), rows)
        batch["reference_log_probs"] = sums
    give_weights(module, model, 0)
    loss = module.train_batch(batch)["loss"].value
    expected = NUMBERS[name]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    parameters = canonical_parameters(module.engine.module)
    assert len(expected["gradients"]) == len(parameters)
    for theirs, rule in rules_of(model).items():
        grad = parameters[rule.ours[0]].grad
        norm, projected = expected["gradients"][theirs]
        assert grad.norm().item() == pytest.approx(norm, rel=1e-5), theirs
        own = (grad * direction(theirs, grad.shape)).sum().item()
        assert own == pytest.approx(projected, abs=1e-5 * norm), theirs
