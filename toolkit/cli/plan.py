"""`toolkit plan`: what a config needs on a number of devices."""

import os
from typing import Annotated

import typer

from toolkit import commands
from toolkit.cli.options import Base, Config, Json, Overrides, SequenceLength, option
from toolkit.cli.printing import print_json


def plan(
    config: Config,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, option("Number of devices.", shown="the fewest on which it fits", metavar="N")
    ] = None,
    gpus_per_node: Annotated[int, option("Devices of one machine.", metavar="N")] = 8,
    device: Annotated[
        str, option("h100, h200, b200, a100-40, a100-80, l40s, rtx4090, mi300x or cpu.")
    ] = "h100",
    search: Annotated[
        bool, option("Compare all layouts, and name the fastest that fit.", "--search")
    ] = False,
    simulate: Annotated[
        bool,
        option("Count in the real model and engine, as one rank without weights.", "--simulate"),
    ] = False,
    price_per_gpu_hour: Annotated[
        float | None, option("Adds what a day and the run cost.", metavar="X")
    ] = None,
    sequence_length: SequenceLength = None,
    base: Base = None,
    json: Json = False,
) -> None:
    """Tell the memory, exchanges and time of a config on devices that need not be here.

    Nothing is downloaded, read or written. Without --search the layout is the config's own:
    dp_config, tp_config, cp_config, pp_config and ep_config of train_module.

    \b
    Examples:
      toolkit plan llama3_8B --world-size 64
      toolkit plan llama3_8B --world-size 64 --train_module.tp_config.degree=2
      toolkit plan my.json --world-size 16 --device a100-80 --search --price-per-gpu-hour 2
    """
    environ = commands.plan.launched(os.environ, world_size, searches=search)
    loaded = commands.load.load(
        config, overrides, base, environ=environ, sequence_length=sequence_length
    )
    answer = commands.plan.plan_experiment(
        loaded,
        os.environ,
        world_size=world_size,
        machine=gpus_per_node,
        device=device,
        searches=search,
        simulates=simulate,
        price=price_per_gpu_hour,
    )
    if json:
        print_json(answer.data)
    else:
        typer.echo(answer.text)
