"""`toolkit export-hf`."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.arguments import run_named
from toolkit.wording import count

if TYPE_CHECKING:
    from toolkit.hf.export import Exported
    from toolkit.hf.source import ModelSource


class WeightType(StrEnum):
    """Types of weights on disk."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export_hf(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder, or a step{N} folder."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder that is new or empty.")],
    dtype: Annotated[
        WeightType,
        typer.Option(
            help="Type of the weights. auto: what the model had when it was imported, else fp32."
        ),
    ] = WeightType.auto,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file of weights.")
    ] = "5GB",
    merge_adapter: Annotated[
        bool,
        typer.Option(
            "--merge-adapter", help="Of a LoRA run: the whole model, not the adapter alone."
        ),
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Tokenizer.", show_default="the model's")
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Load the result with transformers and compare its logits and token ids.",
            show_default="if there is memory for it",
        ),
    ] = None,
) -> None:
    """Write a model as a folder that AutoModelForCausalLM.from_pretrained loads.

    Of a run, the newest checkpoint counts. Weights go from file to file tensor by tensor, so memory
    stays small. The folder holds config.json, generation_config.json, safetensors, the tokenizer
    with its chat template, and a model card (README.md) made from the run's own records. It gets
    its name only when it has been loaded again and gave the same logits.

    Of a LoRA run, the adapter is written as `peft` reads it.

    \b
    Examples:
      toolkit export-hf runs/quickstart/first exported/first
      toolkit export-hf runs/quickstart/first/checkpoints/step200 step200 --dtype bf16
      toolkit export-hf runs/finetune_lora/first merged --merge-adapter --max-shard-size 2GB
    """
    from toolkit.commands.export import ExportOptions, export_model
    from toolkit.config.paths import local_path

    options = ExportOptions(dtype.value, max_shard_size, merge_adapter, tokenizer, check)
    found, exported = export_model(run_named(source), local_path(out, "OUT"), options)
    _print_summary(found, exported, out)


def _print_summary(source: "ModelSource", exported: "Exported", out: str) -> None:
    files = count(len(exported.weight_files), "file")
    kind = str(exported.dtype).removeprefix("torch.")
    what = "adapter for " if exported.is_adapter else ""
    step = f", step {source.metadata.step}" if source.metadata is not None else ""
    typer.echo(
        f"{out}: {what}{exported.architecture} in {kind}, "
        f"{exported.weight_bytes / 1e6:,.1f} MB in {files} ({source.where}{step})"
    )
    if exported.not_checked is None:
        loads = "peft loads it onto its base" if exported.is_adapter else "transformers loads it"
        ids = " and token ids" if exported.has_tokenizer else ""
        typer.echo(f"checked: {loads} and gives the same logits{ids}")
    else:
        typer.echo(f"not checked: {exported.not_checked}")
    if exported.only_newer is not None:
        typer.echo(
            f"note: needs transformers 5: version 4 computes other logits ({exported.only_newer})"
        )
    if not exported.has_tokenizer:
        typer.echo("no tokenizer is known for this model; --tokenizer FOLDER adds one")
    if exported.is_adapter:
        typer.echo(f'PeftModel.from_pretrained(base, "{out}") loads it')
        return
    typer.echo(f"next: toolkit generate {out} --prompt '...'")
    typer.echo(f'  or: AutoModelForCausalLM.from_pretrained("{out}")')
