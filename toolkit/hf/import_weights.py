"""Tensors of a Hugging Face folder as ours, one at a time.

1. The family's rules, run on tensors without storage, tell the shape of every tensor of theirs.
   Names, shapes and types of the whole folder are compared with that before a value is read: every
   tensor of theirs is used exactly once and every one of ours is filled, or it is an error.
2. Then group after group is read, in the order in which they lie in the files, rearranged, and
   given out in its own type. Rows of the vocabulary that only pad are zeros.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.hf.family import SAME, Family, Rule
from toolkit.hf.weights import HFWeights
from toolkit.models.config import TransformerConfig
from toolkit.models.shapes import state_shapes

VOCABULARY = ("embeddings.tokens.weight", "head.weight")
"""Our tensors that have a row for each token id, and padding."""

_NAMED = 3


class ImportPlan:
    """What is read for which tensor of ours; nothing has been read yet. Raises CheckpointError for
    a tensor that is missing, of another shape or type than expected, or has no place in the model.

    Args:
        config: the model to fill. Its vocabulary may be larger than the folder's.
        source_vocab_size: rows of the folder's vocabulary; default: those of `config`.
        known_ids: the rows among them that stand for tokens; default: all.
        new_ids: tokens that the folder's model does not know. Their rows, and all that the folder
            lacks, get the mean of those of `known_ids` (Hewitt 2021, "Initializing new word
            embeddings for pretrained language models"), so that no new token is more probable than
            old ones are on average.
    """

    def __init__(
        self,
        family: Family,
        config: TransformerConfig,
        weights: HFWeights,
        *,
        source_vocab_size: int | None = None,
        known_ids: Collection[int] | None = None,
        new_ids: Collection[int] = (),
    ) -> None:
        self._family, self._config, self._weights = family, config, weights
        self._source_vocab = source_vocab_size or config.vocab_size
        self._known_ids = sorted(known_ids if known_ids is not None else range(self._source_vocab))
        self._new_ids = sorted({*new_ids, *range(self._source_vocab, config.vocab_size)})
        if config.num_layers > len(weights.tensors):
            raise CheckpointError(
                f"{weights.folder}: {len(weights.tensors)} tensors cannot fill the "
                f"{config.num_layers} layers that config.json gives"
            )
        self._rules, prefix = family.rules(config), family.base_prefix
        if not any(name.startswith(prefix) for name in weights.tensors):  # of the bare model
            self._rules = [
                rule._replace(theirs=tuple(name.removeprefix(prefix) for name in rule.theirs))
                for rule in self._rules
            ]
        self._take_other_names(family.other_names)
        self._check_names()
        position = {name: n for n, name in enumerate(weights.tensors)}
        self._rules.sort(key=lambda rule: min(position[name] for name in rule.theirs))
        shapes = state_shapes(config)
        filled = {name for rule in self._rules for name in rule.ours}
        if wrong := sorted(filled ^ shapes.keys()):
            raise CheckpointError(
                f"{_some(wrong)} on one side only of the mapping of {family.model_type}"
            )
        self.meta_tensors: dict[str, Tensor] = {}
        """Our names, in the order of `tensors`, and tensors of their shapes and types on the meta
        device."""
        for rule in self._rules:
            ours = [torch.empty(shapes[name], device="meta") for name in rule.ours]
            for name, dtype in zip(rule.ours, self._check(rule, ours), strict=True):
                self.meta_tensors[name] = torch.empty(shapes[name], dtype=dtype, device="meta")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """`(our name, whole CPU tensor)`; memory stays at the tensors of one rule. Raises
        CheckpointError: a file has changed in between."""
        for rule in self._rules:
            theirs = [self._weights.read(name) for name in rule.theirs]
            ours = rule.transform.to_ours(theirs)
            del theirs
            for name in rule.ours:
                tensor = ours.pop(0)
                yield name, self._with_all_rows(name, tensor) if name in VOCABULARY else tensor

    def _with_all_rows(self, name: str, rows: Tensor) -> Tensor:
        meta = self.meta_tensors[name]
        if len(meta) == len(rows) and not self._new_ids:
            return rows
        tensor = torch.zeros(meta.shape, dtype=meta.dtype)
        tensor[: len(rows)] = rows
        if self._new_ids:
            known = rows[torch.tensor(self._known_ids)]
            mean = known.mean(dim=0, dtype=torch.float32)
            tensor[torch.tensor(self._new_ids)] = mean.to(tensor.dtype)
        return tensor

    def _take_other_names(self, others: Mapping[str, str]) -> None:
        present = self._weights.tensors

        def found(name: str) -> str:
            renamed = (name.replace(module, other) for module, other in others.items())
            return name if name in present else next((n for n in renamed if n in present), name)

        self._rules = [rule._replace(theirs=tuple(map(found, rule.theirs))) for rule in self._rules]

    def _check_names(self) -> None:
        present, folder = self._weights.tensors, self._weights.folder
        wanted = [name for rule in self._rules for name in rule.theirs]
        if missing := [name for name in wanted if name not in present]:
            raise CheckpointError(
                f"{folder}: {_some(missing)} missing; config.json asks for "
                f"{'it' if len(missing) == 1 else 'them'}"
            )
        head = ""
        if self._config.tie_embeddings:  # a file may repeat it
            untied = self._family.rules(self._config.replace(tie_embeddings=False))
            head = next((r.theirs[0] for r in untied if r.ours == (VOCABULARY[1],)), "")
        known = re.compile("|".join((re.escape(head), *self._family.buffers)))
        left = (n for n in present.keys() - set(wanted) if not known.fullmatch(n))
        unused = sorted(n for n in left if not self._is_of_further_layer(n))
        if unused:
            raise CheckpointError(
                f"{folder}: {_some(unused)} not in the mapping of "
                f"{self._family.model_type} for this config.json; nothing is dropped silently"
            )
        embedding = next(r.theirs[0] for r in self._rules if r.ours == (VOCABULARY[0],))
        if head in present and not self._weights.is_equal(head, embedding):
            raise CheckpointError(
                f"{folder}: {head} differs from {embedding}, but config.json says "
                "tie_word_embeddings true; set it to false to keep both"
            )

    def _is_of_further_layer(self, name: str) -> bool:
        """Whether it belongs to a block for multi-token prediction, after the last one."""
        layers = re.escape(self._family.layers)
        found = re.match(rf"(?:{layers}|{layers.removeprefix('model.')})\.(\d+)\.", name)
        is_further = found is not None and int(found[1]) >= self._config.num_layers
        return is_further and self._family.passes_over_further_layers

    def _check(self, rule: Rule, ours: list[Tensor]) -> list[torch.dtype]:
        """Shapes and types of their tensors; returns the types of ours."""
        if rule.ours[0] in VOCABULARY:
            assert rule.transform is SAME, "rows of the vocabulary lie alike in all families"
            ours = [ours[0][: self._source_vocab]]
        theirs = []
        wanted = rule.transform.to_theirs(ours)
        if rule.transform.cut_anywhere:
            rows = [self._weights.tensors[name].shape[:1].numel() for name in rule.theirs]
            if sum(rows) == sum(len(tensor) for tensor in wanted):
                wanted = list(torch.cat(wanted).split(rows))
        for name, tensor in zip(rule.theirs, wanted, strict=True):
            stored = self._weights.tensors[name]
            if stored.shape != tensor.shape:
                raise CheckpointError(
                    f"{stored.file}: {name} has shape {tuple(stored.shape)}, but config.json "
                    f"gives {tuple(tensor.shape)}"
                )
            if stored.dtype is None:
                raise CheckpointError(
                    f"{stored.file}: {name} is of type {stored.type_name}; weights must be "
                    "F32, BF16 or F16 (dequantise the model first)"
                )
            theirs.append(torch.empty_like(tensor, dtype=stored.dtype))
        return [tensor.dtype for tensor in rule.transform.to_ours(theirs)]


def _some(names: Sequence[str]) -> str:
    """The first few of `names`, and a verb."""
    text = ", ".join(names[:_NAMED])
    if len(names) > _NAMED:
        text += f" and {len(names) - _NAMED} more ({len(names)} tensors)"
    return f"{text} {'is' if len(names) == 1 else 'are'}"
