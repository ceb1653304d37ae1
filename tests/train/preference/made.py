"""Made-up batches of units, by the contract of the data loader."""

import torch

from tests.tiny import ROWS, SEQ, VOCAB
from toolkit.models.config import TransformerConfig

UNITS = 2
"""Room for units in a row; some rows have fewer."""


def unit_batch(
    step: int, *, unit: str = "pair", seed: int = 7, with_reference: bool = True
) -> dict[str, torch.Tensor]:
    """`ROWS` rows of one or two units, whose answers have one to three tokens."""
    generator = torch.Generator().manual_seed(seed * 1000 + step)
    ids = torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator)
    mask = torch.zeros(ROWS, SEQ, dtype=torch.uint8)
    documents = torch.zeros(ROWS, SEQ, dtype=torch.int32)
    units = torch.full((ROWS, UNITS), -1, dtype=torch.int64)
    number = 0
    for row in range(ROWS):
        place = 0
        for k in range(UNITS if row % 3 else 1):
            prompt = torch.randint(0, VOCAB, (2,), generator=generator)
            kind = 1 + (number % 2)
            sides = (1, 2) if unit == "pair" else (kind, 3)
            for document, side in enumerate(sides):
                tokens = 1 + int(torch.randint(0, 2, (), generator=generator))
                end = place + 2 + tokens
                ids[row, place : place + 2] = prompt
                mask[row, place + 2 : end] = side
                documents[row, place:end] = 2 * k + document
                place = end
            units[row, k] = number
            number += 1
        documents[row, place:] = 2 * (1 + k)
    batch = {"input_ids": ids, "label_mask": mask, "document_ids": documents, "units": units}
    if with_reference:
        values = -5.0 - 10.0 * torch.rand(ROWS, UNITS, 2, generator=generator)
        batch["reference_log_probs"] = values
    return batch


def documents_of(batch: dict[str, torch.Tensor]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of each unit, in the order of the batch, both documents: their ids and masks."""
    found = []
    for row in range(len(batch["units"])):
        for k in range(int((batch["units"][row] >= 0).sum())):
            sides = []
            for document in (2 * k, 2 * k + 1):
                here = batch["document_ids"][row] == document
                sides.append((batch["input_ids"][row][here], batch["label_mask"][row][here]))
            found.append(sides)
    return found


def scored(config: TransformerConfig) -> TransformerConfig:
    return config.replace(num_scores=1)
