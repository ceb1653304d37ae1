"""Pipeline parallelism on paper: which layers each stage has, and which stages each rank has.

    1F1B               one stage a rank
    Interleaved1F1B    two: rank r of n has the stages r and n + r
    ZBVZeroBubble      two: rank r of n has the stages r and 2n - 1 - r, first and last on rank 0

No torch: `--dry-run` and `toolkit plan` ask too. `stages.py` cuts the model accordingly, and
`pipeline_engine.py` runs it.
"""

import functools
from typing import NamedTuple

from toolkit.distributed.config import PipelineParallelConfig, PipelineSchedule
from toolkit.errors import ConfigError
from toolkit.models.architecture import Architecture
from toolkit.models.shapes import block_flops_per_token, head_flops_per_token
from toolkit.wording import count

PP_CONFIG = "train_module.pp_config"


class Pipeline(NamedTuple):
    """The stages of a model, and the ranks of a pipeline that have them."""

    config: PipelineParallelConfig
    """Says which rank has which stages."""
    layers: tuple[range, ...]
    """Of each stage. The embeddings go with layer 0, the head with the last one."""

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    def rank_of(self, stage: int) -> int:
        return self.config.rank_of(stage)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return self.config.stages_of(rank)

    @property
    def last_rank(self) -> int:
        return self.config.last_rank

    def describe(self, rank: int) -> str:
        """What this rank has, in a few words: `stage 1 of 4 (layers 8-15)`."""
        own = self.stages_of(rank)
        spans = [(self.layers[stage][0], self.layers[stage][-1]) for stage in own]
        layers = " and ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans)
        numbers = " and ".join(str(stage + 1) for stage in own)
        noun = "layer" if layers.isdecimal() else "layers"
        return f"stage{'s' * (len(own) > 1)} {numbers} of {self.num_stages} ({noun} {layers})"


def plan_pipeline(
    model: Architecture, config: PipelineParallelConfig, *, ranks: int = 0
) -> Pipeline:
    """The stages of `model`. Without split points, the costliest of them is as cheap as can be.
    Raises ConfigError: there are fewer layers than stages, or than a split point says; a degree
    that works divides `ranks`, if given."""
    layers, points = model.num_layers, config.split_points
    if config.stages > layers:
        most = layers // (config.stages // config.degree)
        fits = next(d for d in range(max(most, 1), 0, -1) if ranks % d == 0)
        largest = fits if ranks else f"a degree of at most {fits}"
        advice = f"use {largest}" if fits > 1 else "leave pp_config out"
        raise ConfigError(
            f"{config.schedule} on {config.degree} ranks has {config.stages} stages, but the model "
            f"has {count(layers, 'layer')}; {advice}",
            key=f"{PP_CONFIG}.degree",
        )
    if points is None:
        ranges = _even_stages(model, config.stages)
    elif points[-1] >= layers:
        raise ConfigError(
            f"{points[-1]} is not a layer of the model, whose last one is {layers - 1}",
            key=f"{PP_CONFIG}.split_points",
        )
    else:
        ranges = tuple(map(range, (0, *points), (*points, layers)))
    return Pipeline(config, ranges)


def fits_microbatches(schedule: PipelineSchedule, degree: int, number: int) -> bool:
    """Whether the schedule runs with this number of microbatches a step."""
    if schedule == "Interleaved1F1B":
        # Rounds of equal size, as many as whole groups of `degree` fit.
        return number % max(1, number // degree) == 0
    return number >= degree


def check_microbatches(
    schedule: PipelineSchedule,
    degree: int,
    rows: int,
    microbatch: int,
    *,
    length: int,
    batch_ranks: int | None = None,
) -> None:
    """Check that `rows` rows of `length` tokens a step of each rank, in microbatches of
    `microbatch` rows (the last one is padded), fit the schedule. Raises ConfigError: naming the
    nearest size that does and divides the rows, or where none does the global batch of
    `batch_ranks` ranks that would."""
    number = -(-rows // microbatch)
    if fits_microbatches(schedule, degree, number):
        return
    divisors = [m for m in range(1, rows + 1) if rows % m == 0]
    works = [m for m in divisors if fits_microbatches(schedule, degree, rows // m)]
    needs = (
        f"a multiple of {max(1, number // degree)} of them"
        if schedule == "Interleaved1F1B"
        else f"at least {degree}"
    )
    advice = f"a global batch of at least {degree} rows on each data-parallel rank is needed"
    if batch_ranks is not None:
        tokens = degree * microbatch * length * batch_ranks
        advice = f"use data_loader.global_batch_size {tokens} or a multiple of it"
    if works:
        nearest = min(works, key=lambda m: (abs(m - microbatch), -m))
        advice = f"use {nearest * length}, which makes {rows // nearest}"
    raise ConfigError(
        f"{count(rows, 'row')} a step on each rank in microbatches of {microbatch} make "
        f"{count(number, 'microbatch')}, and {schedule} on {degree} ranks needs "
        f"{needs}; {advice}",
        key="train_module.rank_microbatch_size",
    )


@functools.lru_cache(maxsize=64)
def _even_stages(model: Architecture, num_stages: int) -> tuple[range, ...]:
    """Split the layers so that the costliest stage is as cheap as can be, then the next costliest;
    among equals, with fewer layers in earlier stages, which keep more activations."""
    length = model.max_sequence_length
    costs = [block_flops_per_token(model, layer, length) for layer in range(model.num_layers)]
    costs[-1] += head_flops_per_token(model)
    before = [0]
    for cost in costs:
        before.append(before[-1] + cost)
    # The best split of the first `n` layers into stages: its costs in falling order, its points.
    best: dict[int, tuple[list[int], tuple[int, ...]]] = {0: ([], (0,))}
    for _ in range(num_stages):
        longer: dict[int, tuple[list[int], tuple[int, ...]]] = {}
        for end in range(1, len(before)):
            for start in range(end - 1, -1, -1):
                own = before[end] - before[start]
                if end in longer and own > longer[end][0][0]:
                    break  # longer stages cost more still
                if start in best:
                    others, points = best[start]
                    ordered = sorted((*others, own), reverse=True)
                    candidate = (ordered, (*points, end))
                    longer[end] = min(longer.get(end, candidate), candidate)
        best = longer
    points = best[len(costs)][1]
    return tuple(map(range, points, points[1:]))
