"""`toolkit generate`: from what is on disk to a model that continues text.

1. A folder of `transformers` is taken as it is.
2. Of a checkpoint, its hf/ is taken where it has one; else its weights are exported into a
   temporary folder, adapters merged into their base.
3. Models that no class of `transformers` holds are computed by ours, without a key/value cache.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from toolkit.checkpoint.folder import HF_FOLDER
from toolkit.commands.models import DTYPES, DType, hf_folder_of, pick_device
from toolkit.commands.runs.named import folder_of
from toolkit.data.prepare.build.stops import stop_ids
from toolkit.data.prepare.tokenizers.auto import load_auto_tokenizer
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.errors import ConfigError, DataError
from toolkit.evaluate.continuation import PlainContinuation, Sampling, TransformersContinuation
from toolkit.evaluate.prompts import Prompt, completed, read_prompts
from toolkit.evaluate.text import Generated, TextGenerator
from toolkit.hf import loading
from toolkit.hf.choose import hf_architecture
from toolkit.hf.export import export_source, generation_of
from toolkit.hf.source import find_source, load_model

__all__ = ["Prompt", "completed_line", "open_generator", "read_prompts", "sampling"]

Notify = Callable[[str], None]


def sampling(
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Sampling:
    asked = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    asked.filled(Sampling())
    return asked


def completed_line(prompt: Prompt, done: Generated) -> bytes:
    """A line of `--output`."""
    numbers = {key: value for key, value in done._asdict().items() if key != "text"}
    return msgspec.json.encode({**completed(prompt, done.text), **numbers}) + b"\n"


@contextlib.contextmanager
def open_generator(
    where: str,
    *,
    tokenizer: str | None = None,
    dtype: DType | None = None,
    device: str | None = None,
    notify: Notify = lambda line: None,
) -> Iterator[TextGenerator]:
    """The model `where` (a run, a step folder, or a folder of `transformers`) and its tokenizer,
    until the block is left; temporary files are then gone.

    By default it computes in bf16 on the first GPU, else in fp32. `notify` is told, in a line, what
    is not as one might expect.
    """
    where = str(folder_of(where))
    folder = hf_folder_of(where)
    source = None if folder is not None else find_source(where)
    found = folder if source is None else source.tokenizer_folder
    if tokenizer is not None:
        found = Path(tokenizer).expanduser()
    if found is None:
        raise DataError(f"{where}: no tokenizer here; give one with --tokenizer FOLDER")
    loaded_tokenizer = load_auto_tokenizer(found)
    place = pick_device(device)
    kind = DTYPES[dtype or ("bf16" if place.type == "cuda" else "fp32")]
    if source is not None and source.config.to_transformer().num_scores is not None:
        raise ConfigError(f"{where}: a reward model scores texts and writes none")
    if source is not None and hf_architecture(source.config) is None:
        notify(
            "no transformers class holds this model: each token computes the whole text anew, "
            "which takes longer"
        )
        model = load_model(source, device=place, dtype=kind)
        ends = stop_ids(load_tokenizer(found), generation_of(source))
        yield TextGenerator(where, PlainContinuation(model, stop_ids=ends), loaded_tokenizer)
        return
    with contextlib.ExitStack() as stack:
        if source is not None:
            assert source.checkpoint is not None, "not a folder of transformers"
            assert source.metadata is not None, "a checkpoint has it"
            folder = source.checkpoint / HF_FOLDER
            # Where it holds the whole model, `find_source` has checked that its files are whole.
            if f"{HF_FOLDER}/config.json" not in source.metadata.files:
                parent = tempfile.TemporaryDirectory(prefix="toolkit-generate-")
                folder = Path(stack.enter_context(parent)) / HF_FOLDER
                export_source(source, folder, dtype=kind, merge_adapter=True, check=False)
        assert folder is not None, "found, or exported"
        continuation = TransformersContinuation(
            loading.load_causal_lm(folder, dtype=kind).to(place)
        )
        stack.enter_context(loading.quiet_transformers())
        yield TextGenerator(where, continuation, loaded_tokenizer)
