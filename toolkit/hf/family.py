"""How one architecture of `transformers` relates to our parts: a table, used in both directions.

Whether a family can hold a model of ours is not written down apart: it can if the config.json that
it makes of the model's config is read back as the same model (`choose.py`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.models.config import TransformerConfig
from toolkit.models.shapes import state_shapes

_REQUIRED: Any = object()
_NOTED = ("drop", "noise")
SCORED = "ForSequenceClassification"
"""How the names of classes end whose head gives scores, at the last token."""

_OF_TEXT = {"Gemma3": "Gemma3Text", "Qwen3_5": "Qwen3_5Text"}
"""Where the class without `Text` is that of a model with images."""

Tensors = Sequence[Tensor]


class Settings:
    """Reads fields of a config.json, in the form that transformers >= 5 gives them
    (`rope_parameters`, `layer_types`), and remembers which ones were: none may be overlooked."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._taken: set[str] = set()
        self.notes: list[str] = []
        """What the user should know, a line each."""

    @property
    def model_type(self) -> str:
        return str(self._values.get("model_type"))

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a field; raises CheckpointError where it is missing without a default."""
        self._taken.add(name)
        value = self._values.get(name, default)
        if value is _REQUIRED:
            raise CheckpointError(f"config.json: {name} is missing")
        return value

    def require(self, name: str, *allowed: Any) -> Any:
        """The value of a field that must be one of `allowed`, or absent: then the first of them.
        Raises CheckpointError for another one, which our parts cannot compute."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            known = " or ".join(repr(choice) for choice in allowed)
            raise CheckpointError(f"{self.not_covered(f'{name} {value!r}')}, which knows {known}")
        return value

    def without_effect(self, *names: str) -> None:
        """Fields that change neither weights nor logits. A dropout or noise that is not 0 is noted:
        training here uses none."""
        for name in names:
            value = self.take(name, None)
            if value and any(word in name for word in _NOTED):
                self.notes.append(f"{name} {value} of the original is not used in training")

    def check_all_taken(self, meaningful: Collection[str]) -> None:
        """Raise CheckpointError, naming it, for a field of `meaningful` that nobody has read,
        unless it switches something off."""
        for name in sorted(set(meaningful) & set(self._values) - self._taken):
            value = self._values[name]
            if value is not None and value is not False:
                raise self.not_covered(f"{name} {value!r}")

    def not_covered(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"config.json: {what} is not covered by the mapping of {self.model_type}"
        )


class Part(NamedTuple):
    """Some fields of config.json, and the fields of `TransformerConfig` that say the same."""

    read: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    """Ours from theirs; raises CheckpointError by name for what our parts do not compute."""
    write: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {}
    """Theirs, every field that `read` takes. What the class cannot express is not in it."""


class Transform(NamedTuple):
    """A group of our tensors as tensors of theirs: a rearrangement of rows (dimension 0), then
    perhaps a transposition."""

    join: Callable[[Tensors], list[Tensor]] = list
    """Ours to theirs. Works on rows alone, so it serves weights, biases and the output side of
    low-rank adapters alike."""
    split: Callable[[Tensors], list[Tensor]] = list
    """Theirs to ours, undoing `join`."""
    transposed: bool = False
    """Theirs are kept as `(in, out)` (GPT-2's Conv1D)."""
    cut_anywhere: bool = False
    """Theirs are read together, whichever has how many of the rows: transformers (5.23) writes the
    convolutions of OLMo-hybrid in equal parts."""

    def to_theirs(self, ours: Tensors) -> list[Tensor]:
        """Our tensors, in the order of the rule, as theirs."""
        joined = self.join(ours)
        return [tensor.t().contiguous() for tensor in joined] if self.transposed else joined

    def to_ours(self, theirs: Tensors) -> list[Tensor]:
        """Their tensors, in the order of the rule, as ours."""
        if self.transposed:
            theirs = [tensor.t() for tensor in theirs]
        return [tensor.contiguous() for tensor in self.split(theirs)]


SAME = Transform()
"""Kept alike."""
STACKED = Transform(
    lambda ours: list(ours[0].unbind(0)), lambda theirs: [torch.stack(list(theirs), dim=0)]
)
"""Ours holds in dimension 0 what they keep apart: one tensor per expert."""


def joined(sizes: Sequence[int]) -> Transform:
    """Several projections of one input one below the other; `sizes`: rows of each of ours."""
    return Transform(
        lambda ours: [torch.cat(list(ours), dim=0)],
        lambda theirs: list(theirs[0].split(list(sizes), dim=0)),
    )


def convolutions(sizes: Sequence[int], *, are_apart: bool) -> Transform:
    """Depthwise convolutions, `(channels, 1, kernel_size)`, of ours without the 1: all in one, or
    each by itself. `sizes`: channels of ours."""
    one = joined(sizes)
    return Transform(
        lambda ours: [tensor[:, None] for tensor in (ours if are_apart else one.join(ours))],
        lambda theirs: one.split([torch.cat(list(theirs))[:, 0]]),
        cut_anywhere=are_apart,
    )


def neighbours(head_dim: int, rotary_dim: int) -> Transform:
    """Queries or keys whose rotation pairs channels 2 i and 2 i + 1 of a head, where ours pairs i
    and i + rotary_dim / 2 (GLM)."""
    half = rotary_dim // 2
    ours = [channel for i in range(half) for channel in (i, i + half)]
    order = torch.tensor([*ours, *range(rotary_dim, head_dim)])

    def moved(tensors: Tensors, to: Tensor) -> list[Tensor]:
        return [t.unflatten(0, (-1, head_dim))[:, to].flatten(0, 1) for t in tensors]

    back = order.argsort()
    return Transform(lambda ours: moved(ours, order), lambda theirs: moved(theirs, back))


def interleaved(num_heads: int, *, number: int = 3) -> Transform:
    """A `number` of projections with as many heads each, head by head: the first head of each, then
    the second of each (GPT-NeoX: query, key and value)."""

    def join(ours: Tensors) -> list[Tensor]:
        heads = [tensor.unflatten(0, (num_heads, -1)) for tensor in ours]
        return [torch.stack(heads, dim=1).flatten(0, 2)]

    def split(theirs: Tensors) -> list[Tensor]:
        heads = theirs[0].unflatten(0, (num_heads, number, -1))
        return [tensor.flatten(0, 1) for tensor in heads.unbind(1)]

    return Transform(join, split)


class Rule(NamedTuple):
    """Some tensors of ours and the tensors of the family's state dict that hold the same."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform = SAME


Modules = Mapping[str, str | tuple[str, ...]]
"""Modules, theirs -> ours. Theirs may hold several of ours in one, or, with `{}` in its name, be
one of many experts that ours holds stacked. Where ours is the name of a tensor, so is theirs, or
several, with a space in between. What a model of ours does not have is passed over."""


class Family(NamedTuple):
    """One architecture of `transformers`."""

    model_type: str
    """As in config.json."""
    architecture: str
    """Class name, as in `architectures` of config.json."""
    parts: tuple[Part, ...]
    """All fields of its config.json; later ones win."""
    block: Modules
    """Of each block, in the order of the state dict."""
    linear_block: Modules = {}  # noqa: RUF012
    """Of each block with linear attention."""
    first: Modules = {"model.embed_tokens": "embeddings.tokens"}  # noqa: RUF012 (nobody changes it)
    last: Modules = {  # noqa: RUF012
        "model.norm": "head.norm", "lm_head": "head", "score": "head.score",
    }  # fmt: skip
    """Before and after the blocks."""
    layers: str = "model.layers"
    """What blocks are called."""
    fuse: Callable[[TransformerConfig, list[int]], Transform] = lambda config, rows: joined(rows)
    """How several tensors of ours, of so many rows each, lie in one of theirs."""
    transposed: bool = False
    """Weights in blocks are kept as `(in, out)`."""
    rotates_neighbours: bool = False
    """See `neighbours`."""
    base_prefix: str = "model."
    """Checkpoints of the bare model lack it (`openai-community/gpt2`)."""
    buffers: tuple[str, ...] = ()
    """Regular expressions over names of tensors that some files hold and the config implies."""
    other_names: Mapping[str, str] = {}
    """What modules are called in some files instead."""
    passes_over_further_layers: bool = False
    """Files may hold blocks after the last one, for multi-token prediction, which are not read."""
    can_score: bool = True
    """Whether there is a class `...ForSequenceClassification` too."""
    only_newer: Callable[[TransformerConfig], str | None] = lambda config: None
    """What of a model transformers 4.57 cannot compute, though 5 can; None: nothing."""

    def class_of(self, config: TransformerConfig) -> str:
        """The class of `transformers` that computes `config`: `architecture`, or the one whose head
        gives scores."""
        if config.num_scores is None:
            return self.architecture
        stem = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return _OF_TEXT.get(stem, stem) + SCORED

    def read_config(self, settings: Settings) -> dict[str, Any]:
        """Fields of `TransformerConfig`; raises CheckpointError for what our parts do not cover."""
        return {name: v for part in self.parts for name, v in part.read(settings).items()}

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """Architecture fields of config.json."""
        return {name: v for part in self.parts for name, v in part.write(config).items()}

    def rules(self, config: TransformerConfig) -> list[Rule]:
        """All tensors of the state dict in the model's order; a tied head is left out."""
        shapes = state_shapes(config)
        rules = list(self._rules(config, shapes, self.first))
        for n in range(config.num_layers):
            block = self.linear_block if config.kind_of(n) == "linear" else self.block
            rules += self._rules(config, shapes, block, f"blocks.{n}.", f"{self.layers}.{n}.")
        return [*rules, *self._rules(config, shapes, self.last)]

    def _rules(
        self,
        config: TransformerConfig,
        shapes: Mapping[str, tuple[int, ...]],
        modules: Modules,
        ours_in: str = "",
        theirs_in: str = "",
    ) -> Iterator[Rule]:
        for theirs, parts in modules.items():
            parts = (parts,) if isinstance(parts, str) else parts
            ours = tuple(f"{ours_in}{part}" for part in parts)
            if "{}" in theirs and ours[0] in shapes:
                experts = range(shapes[ours[0]][0])
                names = tuple(f"{theirs_in}{theirs.format(n)}.weight" for n in experts)
                yield Rule(ours, names, STACKED)
            elif ours[0] in shapes:  # a tensor, not a module
                is_convolution = ours[0].endswith("_conv")
                names, transform = tuple(f"{theirs_in}{n}" for n in theirs.split(" ")), SAME
                if is_convolution:
                    sizes = [shapes[name][0] for name in ours]
                    transform = convolutions(sizes, are_apart=len(names) > 1)
                yield Rule(ours, names, transform)
            for kind in ("weight", "bias"):
                names = tuple(f"{name}.{kind}" for name in ours)
                if names[0] not in shapes:
                    continue
                rows = [shapes[name][0] for name in names]
                transform = SAME if len(names) == 1 else self.fuse(config, rows)
                if self.rotates_neighbours and parts[0] in ("attention.query", "attention.key"):
                    transform = neighbours(config.attention_head_dim, config.rotary_dim)
                if self.transposed and ours_in and len(shapes[names[0]]) > 1:
                    transform = transform._replace(transposed=True)
                yield Rule(names, (f"{theirs_in}{theirs}.{kind}",), transform)
