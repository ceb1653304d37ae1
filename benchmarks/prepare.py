"""Speed and memory of `prepare` beside other ways to tokenize the same text on the same cores.

    python benchmarks/prepare.py --megabytes 60
    python benchmarks/prepare.py --megabytes 60 --folder /tmp/bench     # keeps text and tokenizer

The text is what every machine with this toolkit has: the .py, .md, .rst and .txt files of the
interpreter's standard library and of the installed packages, one document each, in jsonl files of
4 MB. The tokenizer is a byte-level BPE of GPT-2's size (50,257 ids), trained on that text.

    bare       all text in memory, only `tokenizers.encode_batch_fast`, which uses all cores itself
    toolkit    `prepare_dataset`: reading, encoding, splitting, hashing, writing, joining, syncing
    nanogpt    `datasets.map` with `num_proc`, tiktoken with the same ranks, then one memmap written
               batch by batch, as nanoGPT's prepare.py does (loading the jsonl is told by itself)
    olmo       a process pool over files, `tokenizers.encode` for each document, raw ids written per
               file, as scripts for OLMo's corpora do

`--formats` prints another table instead: how fast the documents are read out of every format, and
how fast each format is prepared.

Each runs in a process of its own, timed after its imports, and they take turns, so that other load
on the machine hits all of them. Memory is the sum over a contestant's processes of what they use
alone and their share of what they use together (PSS).
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _report import Figure, write_json
from rich.console import Console
from rich.table import Table

VOCAB_SIZE = 50_257
FILE_BYTES = 4_000_000
ENDINGS = (".py", ".md", ".rst", ".txt")
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BATCH_DOCUMENTS = 512
NANOGPT_BATCHES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--only", help="comma-separated contestants: bare, toolkit, nanogpt, olmo")
    parser.add_argument("--formats", action="store_true", help="the table of formats instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--contestant", choices=sorted(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        result = CONTESTANTS[arguments.contestant](arguments.folder, arguments.output)
        print("\n" + json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        num_bytes = arguments.megabytes * 1_000_000
        if arguments.formats:
            from _prepare_formats import compare_formats

            console = Console(width=120)
            corpus, _ = corpora(console, folder, num_bytes)
            texts = list(read_corpus(corpus))
            figures = compare_formats(texts, Path(temporary) / "formats", corpus / "tokenizer")
        else:
            only = arguments.only.split(",") if arguments.only else None
            figures = run(folder, Path(temporary), num_bytes, arguments.repeats, only)
        write_json(arguments.json, figures)


def corpora(console: Console, folder: Path, num_bytes: int) -> tuple[Path, Path]:
    """The text, a quarter of it, and the tokenizer in both, made where they are missing."""
    large, small = folder / f"{num_bytes}", folder / f"{num_bytes // 4}"
    documents = None
    for place, size in ((large, num_bytes), (small, num_bytes // 4)):
        if not (place / "done").exists():
            documents = documents or installed_documents(num_bytes)
            write_corpus(place, documents, size)
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        console.print(f"training a BPE of {VOCAB_SIZE} ids")
        train(large, tokenizer)
    for place in (large, small):
        if not (place / "tokenizer").exists():
            (place / "tokenizer").symlink_to(tokenizer.resolve())
    return large, small


def run(
    folder: Path, temporary: Path, num_bytes: int, repeats: int, only: list[str] | None
) -> list[Figure]:
    console = Console(width=120)
    large, small = corpora(console, folder, num_bytes)
    names = ["bare", "toolkit", "olmo"]
    try:
        import tiktoken  # noqa: F401

        names.insert(2, "nanogpt")
    except ImportError:
        console.print("tiktoken is not installed: nanoGPT's way is left out")
    if only is not None:
        names = [name for name in names if name in {"toolkit", *only}]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names:
            results[name].append(contest(name, large, temporary / f"{name}{turn}"))
    report(console, results, large)
    little = contest("toolkit", small, temporary / "small")
    peak = statistics.median(result["peak_bytes"] for result in results["toolkit"])
    console.print(
        f"toolkit memory: {little['peak_bytes'] / 1e6:.0f} MB for {num_bytes / 4e6:.0f} MB of "
        f"text, {peak / 1e6:.0f} MB for {num_bytes / 1e6:.0f} MB"
    )
    whole = statistics.median(result["seconds"] for result in results["toolkit"])
    seconds, share = resume(large, temporary / "resume", whole)
    console.print(
        f"resuming a job killed after {share:.0%} of its parts: {seconds:.2f} s until it encodes "
        f"again, {seconds / whole:.1%} of the job"
    )
    figures = [Figure(name="prepare: memory", value=peak / 1e6, unit="MB", better="lower")]
    for name, found in results.items():
        seconds = statistics.median(result["seconds"] for result in found)
        figures.append(Figure(name=f"prepare: {name}", value=seconds, unit="s", better="lower"))
    return figures


def report(console: Console, results: dict[str, list[dict[str, Any]]], corpus: Path) -> None:
    num_bytes = int((corpus / "done").read_text())
    cores = len(os.sched_getaffinity(0))
    medians = {n: statistics.median(r["seconds"] for r in rs) for n, rs in results.items()}
    table = Table(
        title=f"{num_bytes / 1e6:.0f} MB of text, {VOCAB_SIZE:,} ids, {cores} cores, "
        f"{len(results['toolkit'])} turns"
    )
    columns = ["", "seconds (median)", "tokens", "MB/s", "of bare", "peak MB"]
    for column in (*columns, "toolkit: times as fast"):
        table.add_column(column, justify="right")
    for name, found in results.items():
        seconds = medians[name]
        bare = results.get("bare", found)
        ratios = [b["seconds"] / r["seconds"] for b, r in zip(bare, found, strict=True)]
        share = f"{statistics.median(ratios):.0%} ({min(ratios):.0%}-{max(ratios):.0%})"
        table.add_row(
            name,
            f"{seconds:.2f}",
            f"{found[0]['num_tokens']:,}",
            f"{num_bytes / seconds / 1e6:.2f}",
            share if "bare" in results else "",
            f"{max(result['peak_bytes'] for result in found) / 1e6:.0f}",
            f"{seconds / medians['toolkit']:.2f}x",
        )
    console.print(table)
    if "nanogpt" in results:
        loading = statistics.median(result["load_seconds"] for result in results["nanogpt"])
        ratio = (medians["nanogpt"] + loading) / medians["toolkit"]
        console.print(
            f"nanogpt with loading the jsonl, which toolkit does too: {loading:.2f} s more; "
            f"toolkit is {ratio:.2f}x as fast"
        )


def contest(name: str, corpus: Path, output: Path) -> dict[str, Any]:
    """One contestant in a process of its own; its result and its peak of memory."""
    with start(name, corpus, output) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.1)
        assert process.stdout is not None
        text = process.stdout.read()
    assert process.returncode == 0, f"{name} failed"
    return {**json.loads(text.splitlines()[-1]), "peak_bytes": peak}


def start(name: str, corpus: Path, output: Path) -> subprocess.Popen[str]:
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--contestant", name, "--folder", str(corpus)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true" if name == "bare" else "false"}
    environment["HF_DATASETS_CACHE"] = str(output / "cache")
    return subprocess.Popen(
        [*command, "--output", str(output)], stdout=subprocess.PIPE, text=True, env=environment
    )


def memory_of(pid: int) -> int:
    total = 0
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def resume(corpus: Path, output: Path, whole: float) -> tuple[float, float]:
    """Kill a job halfway; seconds until the next one encodes, and the share that was kept."""
    with start("toolkit", corpus, output) as process:
        time.sleep(1.0 + whole / 2)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(children)
    result = contest("toolkit", corpus, output)
    return result["seconds_to_encode"], result["share_kept"]


def run_bare(corpus: Path, output: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json"))
    texts = list(read_corpus(corpus))
    started, num_tokens = time.perf_counter(), 0
    for first in range(0, len(texts), BATCH_DOCUMENTS):
        batch = texts[first : first + BATCH_DOCUMENTS]
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        num_tokens += sum(len(encoding) for encoding in encodings)
    return {"seconds": time.perf_counter() - started, "num_tokens": num_tokens}


def run_toolkit(corpus: Path, output: Path) -> dict[str, Any]:
    from toolkit.data.config import DatasetConfig, FilesSourceConfig, HFTokenizerConfig
    from toolkit.data.prepare.build import prepare

    config = DatasetConfig(
        root=str(output / "data"),
        source=FilesSourceConfig(paths=[str(corpus)]),
        tokenizer=HFTokenizerConfig(path=str(corpus / "tokenizer")),
    )
    found: dict[str, float] = {}
    begin = prepare.encoding

    def watched(where: str, jobs: Any, missing: Any, *rest: Any, **options: Any) -> Any:
        found["seconds_to_encode"] = time.perf_counter() - started
        found["share_kept"] = 1 - len(missing) / len(jobs)
        return begin(where, jobs, missing, *rest, **options)

    prepare.encoding = watched
    started = time.perf_counter()
    prepared = prepare.prepare_dataset(config, progress=False)
    seconds = time.perf_counter() - started
    splits = prepared.manifest.splits.values()
    # Without the end-of-document tokens, which "bare" does not make.
    num_tokens = sum(split.num_tokens - split.num_documents for split in splits)
    return {"seconds": seconds, "num_tokens": num_tokens, **found}


def run_nanogpt(corpus: Path, output: Path) -> dict[str, Any]:
    import datasets
    import tiktoken

    datasets.disable_progress_bars()
    vocabulary = json.loads((corpus / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    ranks = as_bytes(vocabulary)
    encoding = tiktoken.Encoding(
        "bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 0}
    )
    files = sorted(str(path) for path in corpus.glob("*.jsonl"))
    loading = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=files, split="train")

    def process(example: dict[str, Any]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(0)
        return {"ids": ids, "len": len(ids)}

    started = time.perf_counter()
    loading = started - loading
    done = loaded.map(
        process, remove_columns=["text"], num_proc=len(os.sched_getaffinity(0)), desc="tokenizing"
    )
    length = int(np.sum(done["len"], dtype=np.uint64))
    array = np.memmap(output / "train.bin", dtype=np.uint16, mode="w+", shape=(length,))
    place = 0
    for index in range(NANOGPT_BATCHES):
        batch = done.shard(num_shards=NANOGPT_BATCHES, index=index, contiguous=True)
        ids = np.concatenate(batch.with_format("numpy")["ids"][:])
        array[place : place + len(ids)] = ids
        place += len(ids)
    array.flush()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "num_tokens": length - len(done), "load_seconds": loading}


def run_olmo(corpus: Path, output: Path) -> dict[str, Any]:
    files = sorted(corpus.glob("*.jsonl"))
    tokenizer = str(corpus / "tokenizer" / "tokenizer.json")
    started = time.perf_counter()
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        jobs = [(file, output / f"{file.stem}.npy", tokenizer) for file in files]
        num_tokens = sum(pool.imap_unordered(olmo_file, jobs))
    return {"seconds": time.perf_counter() - started, "num_tokens": num_tokens}


def olmo_file(job: tuple[Path, Path, str]) -> int:
    from tokenizers import Tokenizer

    source, target, tokenizer_file = job
    tokenizer = Tokenizer.from_file(tokenizer_file)
    ids: list[int] = []
    num_documents = 0
    with source.open() as file:
        for line in file:
            text = json.loads(line)["text"]
            ids.extend(tokenizer.encode(text, add_special_tokens=False).ids)
            ids.append(0)
            num_documents += 1
    array = np.memmap(target, dtype=np.uint16, mode="w+", shape=(len(ids),))
    array[:] = ids
    array.flush()
    return len(ids) - num_documents


CONTESTANTS = {
    "bare": run_bare,
    "toolkit": run_toolkit,
    "nanogpt": run_nanogpt,
    "olmo": run_olmo,
}


def as_bytes(vocabulary: dict[str, int]) -> dict[bytes, int]:
    """Tokens as bytes; ids rise in the order of merges, so they are ranks."""
    from toolkit.data.prepare.tokenizers.fast_bpe import byte_characters

    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    return {
        bytes(byte_of[character] for character in token): token_id
        for token, token_id in vocabulary.items()
        if token != "<|endoftext|>"
    }


def installed_documents(num_bytes: int) -> list[str]:
    """Files of the standard library and installed packages, in an order by hash."""
    import xxhash

    roots = {sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]}
    paths = sorted(
        {path for root in roots for path in Path(root).rglob("*") if path.suffix in ENDINGS},
        key=lambda path: (xxhash.xxh3_64_intdigest(path.name.encode()), str(path)),
    )
    documents, total = [], 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            documents.append(text)
            total += len(text.encode())
        if total >= num_bytes:
            return documents
    raise SystemExit(f"only {total / 1e6:.0f} MB of text are installed; ask for fewer --megabytes")


def write_corpus(folder: Path, documents: list[str], num_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    total = number = 0
    lines: list[str] = []
    pending = 0
    for text in documents:
        size = len(text.encode())
        lines.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        pending, total = pending + size, total + size
        if pending >= FILE_BYTES or total >= num_bytes:
            (folder / f"{number:05d}.jsonl").write_text("".join(lines))
            lines, pending, number = [], 0, number + 1
        if total >= num_bytes:
            break
    (folder / "done").write_text(str(total))


def read_corpus(folder: Path) -> Any:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open() as file:
            for line in file:
                yield json.loads(line)["text"]


def train(corpus: Path, folder: Path) -> None:
    from toolkit.data.prepare.tokenizers.tokenizer import train_bpe

    tokenizer = train_bpe(read_corpus(corpus), VOCAB_SIZE)
    assert tokenizer.vocab_size == VOCAB_SIZE, "too little text for so large a vocabulary"
    tokenizer.save(folder)


if __name__ == "__main__":
    main()
