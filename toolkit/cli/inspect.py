"""`toolkit data inspect`."""

from typing import TYPE_CHECKING, Annotated

import typer

from toolkit import commands
from toolkit.cli.options import Json, argument, option
from toolkit.cli.printing import cell, print_json, print_table
from toolkit.errors import DataError
from toolkit.wording import visible

if TYPE_CHECKING:
    from toolkit.data.prepare.tools.report import Inspection, Sample, SplitReport

BAR_WIDTH = 40


def inspect(
    path: Annotated[str, argument("A prepared folder, or a .bin or .npy file.", metavar="PATH")],
    samples: Annotated[int, option("Documents of each split to show.", "-n", metavar="N")] = 3,
    quick: Annotated[
        bool, option("Sizes, index and a few blocks, not every token.", "--quick")
    ] = False,
    dtype: Annotated[
        str | None,
        option("Of a bare file: uint8, uint16, uint32, uint64.", shown="uint16", metavar="TYPE"),
    ] = None,
    vocab_size: Annotated[
        int | None, option("Of a bare file: every id must be below.", metavar="N")
    ] = None,
    eos_id: Annotated[
        int | None, option("Of a bare file: it ends documents.", metavar="ID")
    ] = None,
    json: Json = False,
) -> None:
    """Show what token files hold, and check all of it.

    Counts, lengths of documents, a few documents as text. Checked are sizes, ids against the
    vocabulary, the index, document ends, targets, and the hashes that were taken when the files
    were written; of a bare file, size and numpy header, and ids against --vocab-size. Memory does
    not grow with the files.

    Exit code 0: all is whole. 2: it is not; all problems are listed, the first is the error.

    \b
    Examples:
      toolkit data inspect data/corpus/default
      toolkit data inspect data/corpus/default --quick -n 0
      toolkit data inspect tokens.npy --dtype uint32 --vocab-size 100278 --eos-id 100257
    """
    found = commands.data.inspect_path(
        path, dtype=dtype, vocab_size=vocab_size, eos_id=eos_id, num_samples=samples, quick=quick
    )
    if json:
        print_json(found)
    else:
        _print(found)
    if found.problems:
        others = len(found.problems) - 1
        more = f" (and {others} more, listed above)" if others else ""
        raise DataError(f"{found.problems[0]}{more}")


def _print(found: "Inspection") -> None:
    facts = [found.dtype]
    if found.vocab_size is not None:
        facts.append(f"vocabulary of {found.vocab_size:,}")
    if found.bos_id is not None and found.prepend_bos:
        facts.append(f"bos id {found.bos_id} starts documents")
    if found.eos_id is not None and found.append_eos is not False:
        facts.append(f"eos id {found.eos_id} ends documents")
    if found.unit is not None:
        facts.append(f"every two documents are a unit ({found.unit})")
    if found.tokenizer is not None:
        facts.append(f"tokenizer {found.tokenizer}")
    typer.echo(f"{found.path}: {', '.join(facts)}")
    header = [
        "split", "tokens", "documents", "targets", "bytes/token", "largest id", "size",
    ]  # fmt: skip
    rows = []
    for split in found.splits:
        size, targets = split.num_bytes, split.num_targets
        rows.append(
            [
                split.name,
                cell(split.num_tokens),
                cell(split.num_documents),
                cell(split.num_tokens if targets is None else targets),
                cell(split.bytes_per_token, ".2f"),
                cell(split.largest_id),
                f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} B",
            ]
        )
    print_table(header, rows, right=header[1:])
    of_units = found.unit is not None
    for line in found.audit.lines(of_units=of_units) if found.audit is not None else ():
        typer.echo(line)
    for split in found.splits:
        _print_lengths(split)
        for sample in split.samples:
            _print_sample(split.name, sample)
    typer.echo()
    for problem in found.problems:
        typer.echo(f"problem: {problem}")
    if not found.problems:
        typer.echo(f"OK{_extent(found)}")


def _extent(found: "Inspection") -> str:
    """How far the check went, where not all of it was asked for or possible."""
    is_bare = found.tokenizer is None
    if found.is_quick:
        return " (size only)" if is_bare else " (sizes, index and sampled blocks)"
    if is_bare and found.vocab_size is None:
        return " (size; --vocab-size N checks ids too)"
    return ""


def _print_lengths(split: "SplitReport") -> None:
    if not split.histogram:
        return
    typer.echo()
    empty = f", {split.empty_documents:,} empty" if split.empty_documents else ""
    typer.echo(f"{split.name}: tokens per document, {split.shortest:,} to {split.longest:,}{empty}")
    first = next(power for power, count in enumerate(split.histogram) if count)
    most = max(split.histogram)
    rows = [
        (f"{1 << power:,} to {(2 << power) - 1:,}", count)
        for power, count in enumerate(split.histogram)
        if power >= first
    ]
    width = max(len(label) for label, _ in rows)
    digits = len(f"{most:,}")
    for label, count in rows:
        bar = "#" * -(-count * BAR_WIDTH // most)
        typer.echo(f"  {label:>{width}}  {count:>{digits},}  {bar}".rstrip())


def _print_sample(split: str, sample: "Sample") -> None:
    typer.echo()
    if sample.num_tokens is None:
        length = "beginning"
    else:
        which = "beginning" if sample.side is None else "around the end of the prompt"
        cut = f", {which}" if sample.num_tokens > len(sample.ids) else ""
        length = f"{sample.num_tokens:,} tokens{cut}"
    side = f", {sample.side}" if sample.side is not None else ""
    typer.echo(f"{split}{side}, document {sample.document:,} ({length}):")
    text = sample.text if sample.text is not None else " ".join(map(str, sample.ids))
    for line in visible(text, kept="\n\t").split("\n"):
        typer.echo(f"    {line}")
