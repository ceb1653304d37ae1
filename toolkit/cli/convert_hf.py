"""`toolkit convert-hf`."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from toolkit.hf.convert import Conversion


def convert_hf(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A folder in Hugging Face format, or a hub name."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder that is new or empty.")],
    validate: Annotated[
        bool | None,
        typer.Option(
            "--validate/--no-validate",
            help="Compare the logits of the result with those of transformers.",
            show_default="if there is memory for it",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default="main")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Folder of another tokenizer, for example one that has grown.",
            show_default="the model's",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of token ids; new rows are the mean of the others.",
            show_default="as many as model and tokenizer need",
        ),
    ] = None,
    add_tokens: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Control tokens that the tokenizer is to have."),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Jinja file with the chat template.", show_default="the model's"
        ),
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
    import time
    from pathlib import Path

    from toolkit.commands.finetune import convert_model
    from toolkit.config.paths import local_path
    from toolkit.errors import ConfigError
    from toolkit.hf.convert import ConvertOptions

    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size {vocab_size}: must be greater than 0")
    begin = time.monotonic()

    conversion = convert_model(
        source,
        local_path(out, "OUT"),
        revision=revision,
        options=ConvertOptions(
            validate=validate,
            tokenizer=Path(tokenizer).expanduser() if tokenizer else None,
            vocab_size=vocab_size,
            add_tokens=[word for text in (add_tokens or "").split(",") if (word := text.strip())],
            chat_template=Path(chat_template).expanduser() if chat_template else None,
        ),
    )
    _print_summary(conversion, out, time.monotonic() - begin)


def _print_summary(conversion: "Conversion", out: str, seconds: float) -> None:
    from toolkit.cli.table import size_text

    config = conversion.config
    typer.echo(
        f"{out}: {conversion.model_type}, {config.num_parameters:,} parameters, "
        f"{' and '.join(conversion.dtypes)}, {size_text(conversion.nbytes)}, {seconds:.1f} s"
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
