"""The decoder-only Transformer, put together.

It knows nothing of parallelism, but has the places where that is put in from outside: `attend` of
each attention and `masks` of the model, `dispatch` and `router_sums` of each MoE, `shard` of the
head's loss; positions and document starts as arguments; and `keep_layers`, which makes a model the
stage of a pipeline.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toolkit.models.adapter_state import AdapterState
from toolkit.models.block import Block
from toolkit.models.config import GPTConfig, TransformerConfig
from toolkit.models.embeddings import Embeddings, Head
from toolkit.models.init import initialize_
from toolkit.models.kernels import MaskedBackend
from toolkit.models.layer_inputs import MaskMaker, layer_inputs, row_masks
from toolkit.models.loss import IGNORE_INDEX
from toolkit.models.masks import document_positions, document_starts
from toolkit.models.mtp import MTPLayer, ahead
from toolkit.models.router import RouterSums, combine_layers


class Blocks(nn.Module):
    """Layers by their number in the whole model, of which a stage of a pipeline has some."""

    def __init__(self, blocks: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for layer, block in blocks.items():
            self[layer] = block

    def __getitem__(self, layer: int) -> nn.Module:
        return self.get_submodule(str(layer))

    def __setitem__(self, layer: int, block: nn.Module) -> None:
        self.add_module(str(layer), block)

    def __contains__(self, layer: int) -> bool:
        return str(layer) in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    @property
    def layers(self) -> list[int]:
        return [int(name) for name in self._modules]


class Transformer(nn.Module):
    """Embeddings, blocks, head. Knows nothing of devices' number, shards or precision policies.

    Under autocast the residual stream is in autocast's type from the embedding on, so fp32 weights
    under autocast and low-precision copies of them (FSDP2) compute the same numbers.
    """

    def __init__(
        self, config: TransformerConfig, *, init_device: str = "cpu", seed: int = 0
    ) -> None:
        """Build on `init_device` with the initial values of `seed`; "meta": without storage."""
        super().__init__()
        self.config = config
        self.adapters: AdapterState | None = None
        """Of a model with adapters, what they share."""
        self.masks: MaskMaker = row_masks
        self.masked_backend: MaskedBackend | None = None
        """How masked attention is to be computed; None: the best way here."""
        self.embeddings: Embeddings | None
        self.head: Head | None
        with torch.device("meta"):
            self.embeddings = Embeddings(config)
            self.blocks = Blocks({n: Block(config, n) for n in range(config.num_layers)})
            self.head = Head(config)
            last = config.num_layers
            ahead_of = range(last, last + config.num_mtp_layers)
            self.mtp = nn.ModuleList(MTPLayer(config, Block(config, n)) for n in ahead_of)
        if init_device != "meta":
            self.to_empty(device=init_device)
            initialize_(self, seed)

    @property
    def all_blocks(self) -> Blocks:
        """By number, with those for multi-token prediction, which come after the last layer."""
        further = {self.config.num_layers + n: layer.block for n, layer in enumerate(self.mtp)}
        own = dict(zip(self.blocks.layers, self.blocks, strict=True))
        return Blocks(own | further)  # type: ignore[arg-type]

    @property
    def _masks(self) -> MaskMaker:
        return partial(self.masks, backend=self.masked_backend)

    def keep_layers(self, layers: range) -> None:
        """Make this the stage of a pipeline that has these layers; names of parameters stay.

        The embeddings go with layer 0 and the head with the last one, which has the embeddings too
        where they are tied: a copy of their own, whose gradients the two stages must add up.
        """
        assert not self.mtp, "a pipeline has no place for them"
        is_last = self.config.num_layers - 1 in layers
        self.blocks = Blocks({layer: self.blocks[layer] for layer in layers})
        if 0 not in layers:
            assert self.embeddings is not None
            is_tied = is_last and self.config.tie_embeddings
            self.embeddings = self.embeddings.tied_copy() if is_tied else None
        if not is_last:
            self.head = None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        starts: Tensor | None = None,
        z_loss_multiplier: float = 0.0,
        dropout_keys: Tensor | None = None,
    ) -> Any:
        """Logits, or the sums of the loss. Raises ValueError: see `check_rows`.

        Args:
            input_ids: `(batch, seq)` int64; in a stage without layer 0 the residual stream that the
                stage before has returned, `(batch, seq, d_model)`.
            labels: `(batch, seq)` int64, already shifted: `labels[b, t]` is what follows
                `input_ids[b, t]`; -100 where there is no target.
            document_ids: `(batch, seq)` of integers: attention stays inside stretches of equal
                numbers, positions start over with each; default: each row is one document.
            positions: `(batch or 1, seq)` int64, of each token in its document; default: told from
                the document ids. Their length counts where the residual stream is shorter. Who
                tells them has checked the rows.
            starts: as `document_starts` tells them from the document ids, which is the default.
            z_loss_multiplier: weight of logsumexp(logits)^2 in the loss.
            dropout_keys: `(batch, seq)` int32, for the dropout of adapters (`adapter_state`);
                default: none.

        Returns:
            Without labels: `(batch, seq, vocab_size)` in the compute type, no padding ids.
            With labels: `LossSums` over the target tokens (sums, not means: the caller divides by
            the number of targets of the global batch).
            Of a stage without a head: the residual stream, and its part of `RouterSums` or None.
        """
        config, seq = self.config, input_ids.shape[1]
        if self.adapters is not None:  # until the next forward: blocks may be computed again
            self.adapters.keys = dropout_keys
        if positions is None:
            check_rows(config, input_ids, document_ids)
        # Positions that are told can be anywhere in a row of which only a part is here.
        table_length = seq if positions is None else config.max_sequence_length
        if document_ids is not None and starts is None:
            starts = document_starts(document_ids)
        if positions is None and starts is not None:
            positions = document_positions(starts)
        x = input_ids
        if 0 in self.blocks:
            assert self.embeddings is not None
            x = self.embeddings(input_ids, positions)
        is_target = None if labels is None or config.moe is None else labels != IGNORE_INDEX
        inputs = layer_inputs(
            config,
            x,
            starts,
            positions,
            layers=self.blocks.layers,
            table_length=table_length,
            masks=self._masks,
        )
        routers: list[RouterSums] = []
        for block, (rotary, mask) in zip(self.blocks, inputs, strict=True):
            x, sums = block(x, rotary, mask, is_target)
            if sums is not None:
                routers.append(sums)
        if self.head is None:
            return x, combine_layers(routers, config.num_routers) if routers else None
        tied = None
        if config.tie_embeddings:
            assert self.embeddings is not None
            tied = self.embeddings.tokens.weight
        further = None
        if self.mtp and labels is not None and torch.is_grad_enabled():

            def further(hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
                for part in self._predict_further(hidden, input_ids, labels, starts, positions):
                    if part.router is not None:
                        routers.append(part.router)
                    yield part.hidden, part.labels

        result = self.head(x, labels, tied, z_loss_multiplier=z_loss_multiplier, further=further)
        if config.moe is not None and routers:
            router = combine_layers(routers, config.num_routers)
            result = result.with_router(router, config.moe)
        return result

    def _predict_further(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        starts: Tensor | None,
        positions: Tensor | None,
    ) -> Iterator["Further"]:
        """What the modules for multi-token prediction make of the last hidden state."""
        first = self.config.num_layers
        layers = range(first, first + len(self.mtp))
        options: Any = {"layers": layers, "masks": self._masks}
        inputs = layer_inputs(self.config, hidden, starts, positions, **options)
        for distance, (layer, (rotary, mask)) in enumerate(
            zip(self.mtp, inputs, strict=True), start=1
        ):
            assert self.embeddings is not None, "pipelines have no such modules"
            next_ids, next_labels = ahead(input_ids, labels, starts, distance)
            embedded = self.embeddings(next_ids, positions)
            is_target = next_labels != IGNORE_INDEX
            hidden, router = layer(embedded, hidden, rotary, mask, is_target)
            yield Further(hidden, next_labels, router)


class Further(NamedTuple):
    """Of one module for multi-token prediction."""

    hidden: Tensor
    """`(batch, seq, d_model)`."""
    labels: Tensor
    """`(batch, seq)`: what the head is to predict of it."""
    router: RouterSums | None


class GPTModel(Transformer):
    """`GPTModel(GPTConfig(...))`: learned positions, LayerNorm, GELU, biases, tied head."""

    def __init__(self, config: GPTConfig, *, init_device: str = "cpu", seed: int = 0) -> None:
        super().__init__(config.to_transformer(), init_device=init_device, seed=seed)
        self.gpt_config = config


def check_rows(config: TransformerConfig, input_ids: Tensor, document_ids: Tensor | None) -> None:
    """Raise ValueError for a sequence longer than `config.max_sequence_length`, or document ids of
    another shape than the input ids."""
    seq = input_ids.shape[1]
    if seq > config.max_sequence_length:
        raise ValueError(
            f"sequence of {seq} tokens is longer than model.max_sequence_length "
            f"{config.max_sequence_length}; raise that or shorten the sequences"
        )
    if document_ids is not None and document_ids.shape != input_ids.shape[:2]:
        raise ValueError(
            f"document_ids have the shape {tuple(document_ids.shape)}, input_ids "
            f"{tuple(input_ids.shape)}; give one document number per token"
        )
