"""The stages of a pipeline that one rank has, cut from a model.

Tied embeddings are held twice, by the first stage and by the last one. Where both are on one rank
the last stage's copy is a twin that is no parameter of `Stages`: it follows the first one's.
"""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from toolkit.distributed.pipeline import Pipeline
from toolkit.distributed.shards import ShardSpec, whole_specs
from toolkit.models.transformer import Transformer

TIED = "embeddings.tokens.weight"


class Stages(nn.Module):
    """The stages of `model` that a rank of a pipeline has, by number.

    `model` is taken apart: of a model with storage only the copy of tied embeddings is new.
    """

    def __init__(self, model: Transformer, pipeline: Pipeline, rank: int) -> None:
        super().__init__()
        self.config = model.config
        self.pipeline = pipeline
        self.shards = _specs(model, pipeline)
        self.by_number = nn.ModuleDict()
        for number in pipeline.stages_of(rank):
            stage = copy.copy(model)
            # Submodules, and hooks: FSDP2 has some of its own for each stage.
            dicts = {k: v.copy() for k, v in vars(model).items() if isinstance(v, dict)}
            vars(stage).update(dicts)
            stage.keep_layers(pipeline.layers[number])
            self.by_number[str(number)] = stage

    def items(self) -> list[tuple[int, Any]]:
        """Number and module of each stage, in order."""
        return [(int(number), stage) for number, stage in self.by_number.items()]

    def modules_in_order(self) -> list[Any]:
        return [stage for _, stage in self.items()]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """By name in the whole model, each once."""
        seen: set[str] = set()
        for stage in self.by_number.values() if recurse else ():
            for name, parameter in stage.named_parameters(prefix, True, remove_duplicate):
                if name not in seen:
                    seen.add(name)
                    yield name, parameter

    @property
    def twins(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Both copies of tied embeddings, where this rank has the first stage and the last one."""
        ends = [s.embeddings.tokens.weight for _, s in self.items() if s.embeddings is not None]
        return (ends[0], ends[1]) if len(ends) == 2 else None


def _specs(model: Transformer, pipeline: Pipeline) -> dict[str, ShardSpec]:
    """Of all parameters, those of other ranks too."""
    specs = whole_specs(model)
    if model.config.tie_embeddings and pipeline.last_rank > 0:
        specs[TIED] = specs[TIED]._replace(copies=2)
    return specs
