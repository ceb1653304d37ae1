"""Rows of some tokens that are trained in the place of an embedding's, or a head's, own."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from toolkit.models.adapter_state import AdapterState


class TrainedRows(nn.Module):
    """The rows of `tokens`, `(number, d_model)`, in the order in which they are named; all other
    rows are the table's."""

    def __init__(self, tokens: tuple[int, ...], d_model: int, state: AdapterState) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(tokens), d_model))
        self.state = state
        self._order = sorted(range(len(tokens)), key=tokens.__getitem__)
        self._sorted = [tokens[place] for place in self._order]
        self._on_device: tuple[Tensor, Tensor] | None = None

    def forward(self, table: Tensor) -> Tensor:
        """The whole `table` `(rows, d_model)` with these rows in it."""
        if self.state.is_off:
            return table
        tokens, order = self._indices(table.device)
        return table.index_copy(0, tokens, self.weight.to(table.dtype).index_select(0, order))

    def looked_up(self, found: Tensor, ids: Tensor) -> Tensor:
        """`found`, the table's rows of `ids`, `(batch, seq, d_model)`, with these in the place of
        theirs."""
        tokens, order = self._indices(ids.device)
        place = torch.searchsorted(tokens, ids).clamp(max=len(self._order) - 1)
        own = embedding(order[place], self.weight)
        return torch.where((tokens[place] == ids)[..., None], own.to(found.dtype), found)

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids of the tokens, ascending, and the place of each among the rows."""
        if self._on_device is None or self._on_device[0].device != device:
            both = torch.tensor([self._sorted, self._order], device=device)
            self._on_device = both[0], both[1]
        return self._on_device
