"""A classifier of small images: `toolkit train classify_images.json`, in this folder.

An image is a row of its 64 pixels, numbers from 0 to 255; the last number of the row is its class.
"""

import numpy as np
import torch
from torch import nn

from toolkit import BasicTrainModule

CLASSES, SIDE = 4, 8


class Images:
    """Noisy images with a bright quarter; which one it is, is their class."""

    def __init__(self, count: int, split: str = "train") -> None:
        self.count, self.seed = (count, 0) if split == "train" else (count // 10, 1)
        self.fingerprint = f"images {count} {split}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, number))
        kind = int(random.integers(CLASSES))
        image = random.integers(0, 128, (SIDE, SIDE))
        half = SIDE // 2
        image[kind // 2 * half :, kind % 2 * half :][:half, :half] += 64
        return np.append(image, kind)


class Net(nn.Sequential):
    def __init__(self, width: int) -> None:
        pixels = SIDE * SIDE
        super().__init__(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, CLASSES))


class Classifier(BasicTrainModule):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(batch["input_ids"][:, :-1] / 128 - 1)

    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch["input_ids"][:, -1], reduction="sum")
