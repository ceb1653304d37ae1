"""What instances that follow a plan have in common: the plan, the tokens, and their documents."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.paging import Pages
from toolkit.data.instances.plans import Plan, PlanHeader, ensure_plan


class PlannedInstances:
    """Base of packed, padded and variable instances.

    Attributes:
        header: counts, and the share of positions filled.
    """

    def __init__(self, plan: Plan, make: Callable[[Path], PlanHeader]) -> None:
        """`make` writes the plan's arrays into a folder, where they are not there yet.

        Raises:
            DataError: the token files or their plan are damaged, or the plan cannot be written.
        """
        prepared, split = plan.prepared, plan.split
        self.header = ensure_plan(plan, make)
        self.sequence_length = plan.sequence_length
        self.num_instances = self.header.num_instances
        self.fingerprint = plan.fingerprint
        self.bytes_per_token = prepared.bytes_per_token(split)
        self.tokenizer_folder = prepared.tokenizer_folder
        self._pad_id = prepared.manifest.eos_id or 0
        self._index = DocumentIndex(prepared, split)
        self._tokens = np.asarray(prepared.tokens(split))
        self._pages = Pages(self._tokens)
        mask = prepared.target_mask(split)
        self._targets = None if mask is None else np.asarray(mask)
        self._starts = plan.array("starts")
