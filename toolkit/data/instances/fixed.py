"""Token files as fixed-length instances, and the order in which training sees them."""

import numpy as np

from toolkit.data.order.permutation import KeyedPermutation
from toolkit.data.tokens.prepared import PreparedDataset, Split


class TokenDataset:
    """Instance i is tokens [i * sequence_length, (i + 1) * sequence_length) of a split.

    Attributes:
        instances: memory map of shape `(num_instances, sequence_length)`; the last tokens, fewer
            than one instance, are left out.
    """

    def __init__(self, prepared: PreparedDataset, split: Split, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.fingerprint = prepared.fingerprint(split)
        self.bytes_per_token = prepared.bytes_per_token(split)
        self.tokenizer_folder = prepared.tokenizer_folder
        tokens = np.asarray(prepared.tokens(split))
        self.num_instances = len(tokens) // sequence_length
        used = self.num_instances * sequence_length
        self.instances = tokens[:used].reshape(self.num_instances, sequence_length)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The instances `indices` as int64, shape `(len(indices), sequence_length)`."""
        return self.instances[indices].astype(np.int64)


class BatchOrder:
    """Which instances make up global batch n, a pure function of (fingerprint, seed, epoch).

    Every epoch is a permutation of its own over all instances; the instances that do not fill a
    last batch are left out, other ones in each epoch.
    """

    def __init__(
        self,
        *,
        num_instances: int,
        batch_instances: int,
        fingerprint: str,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.batch_instances = batch_instances
        self.steps_per_epoch = num_instances // batch_instances
        self._num_instances = num_instances
        self._key = f"{fingerprint}:{seed}"
        self._shuffle = shuffle

    def indices(self, first_batch: int, num_batches: int = 1) -> np.ndarray:
        """Instances of global batches [first_batch, first_batch + num_batches).

        Time and memory depend on `num_batches` only. Shape `(num_batches, batch_instances)`.
        """
        pieces, batch, end = [], first_batch, first_batch + num_batches
        while batch < end:
            epoch, place = divmod(batch, self.steps_per_epoch)
            count = min(end - batch, self.steps_per_epoch - place)
            first = place * self.batch_instances
            positions = np.arange(first, first + count * self.batch_instances)
            pieces.append(self._permute(epoch, positions))
            batch += count
        return np.concatenate(pieces).reshape(num_batches, self.batch_instances)

    def _permute(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        if not self._shuffle:
            return positions
        return KeyedPermutation(self._num_instances, f"{self._key}:{epoch}")(positions)
