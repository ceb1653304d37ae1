"""`toolkit doctor`: whether this machine, or all of them, can train."""

import os
from typing import Annotated

import typer

from toolkit import commands
from toolkit.cli.options import (
    Head,
    Interface,
    JoinTimeout,
    Json,
    NodeRank,
    NumNodes,
    Processes,
    option,
)
from toolkit.cli.printing import print_json
from toolkit.distributed.ranks import check_launcher_variables


def doctor(
    context: typer.Context,
    json: Json = False,
    launch: Annotated[
        bool,
        option(
            "Run on all machines of --nodes, or of srun, and gather what they say: one process "
            "for each GPU, unless --processes says otherwise.",
            "--launch",
        ),
    ] = False,
    processes: Processes = None,
    nodes: NumNodes = None,
    node_rank: NodeRank = None,
    head: Head = None,
    interface: Interface = None,
    join_timeout: JoinTimeout = None,
) -> int:
    """Look whether this machine can train: driver, libraries, disks, locks, ports, and speeds.

    Trains a layer of 64 channels for one step and measures products and disks for less than a
    second each; writes nothing that stays. With several processes it also measures all-reduce
    between them, and whether all machines see the same files. Exit code 1 where training would not
    work.

    \b
    Examples:
      toolkit doctor
      toolkit doctor --processes 2
      toolkit doctor --launch --nodes 2 --node-rank 1 --head node0
      srun toolkit doctor --launch --json
    """
    ranks = 0
    if launch or processes is not None:
        check_launcher_variables()
        ranks = int(os.environ.get("WORLD_SIZE", "0"))
    if launch and processes is None and not ranks:
        processes = commands.doctor_ranks.usual_processes()
    asked = commands.launching.planned(
        None, processes, nodes, node_rank, head, interface, join_timeout
    )
    if asked is not None and asked.starts_workers:
        return commands.doctor_ranks.start(asked, context.obj.words, debug=context.obj.debug)
    if ranks > 1:
        gathered = commands.doctor_ranks.examine_ranks()
        found, records = gathered.told(), gathered.as_records()
    else:
        found = commands.doctor.examine()
        records = commands.doctor.as_records(found)
    if os.environ.get("RANK", "0") == "0":
        if json:
            print_json(records)
        else:
            typer.echo(commands.doctor.describe(found))
    return commands.doctor.exit_code(found)
