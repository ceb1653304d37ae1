"""A Hugging Face folder as a checkpoint of ours.

1. config.json picks the family's table; headers and names of all weights are checked.
2. The tokenizer is copied, and grown where that was asked for; the vocabulary follows.
3. Weights stream into `step0`, a committed checkpoint, in the types they are kept in.
4. The result is read back and its logits are compared with those of `transformers`.
5. Everything happened in a temporary folder beside the target, which gets its name last.
"""

import importlib.metadata
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from toolkit.checkpoint.commit import SPARE_BYTES, Save, write_checkpoint
from toolkit.checkpoint.folder import MODEL_PREFIX, TENSORS_FOLDER, check_free_space
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.config.yaml_text import load_yaml
from toolkit.data.prepare.tokenizers.companions import read_json
from toolkit.data.tokens.prepared import TOKENIZER_FOLDER
from toolkit.errors import CheckpointError, ConfigError, DataError, TrainingError
from toolkit.hf import compare
from toolkit.hf.import_weights import ImportPlan
from toolkit.hf.read_config import read_hf_config
from toolkit.hf.source import watched
from toolkit.hf.tokenizer_files import (
    GENERATION_FILE,
    ConvertedTokenizer,
    convert_tokenizer,
    token_ids,
)
from toolkit.hf.weights import HFWeights
from toolkit.models.config import TransformerConfig
from toolkit.storage.atomic import new_output
from toolkit.storage.foreign import read_bytes
from toolkit.storage.progress import byte_progress
from toolkit.wording import count

_VERSIONED = ("torch", "transformers", "tokenizers")


class ConvertOptions(NamedTuple):
    validate: bool | None = None
    """Compare logits with `transformers`; None: if there is memory for it."""
    tokenizer: Path | None = None
    """Another tokenizer than the folder's."""
    vocab_size: int | None = None
    """Token ids of the model; None: as many as it has, or more if the tokenizer has more."""
    add_tokens: Sequence[str] = ()
    """Control tokens that the tokenizer must have."""
    chat_template: Path | None = None
    """File with the chat template."""


AS_IT_IS = ConvertOptions()


class Conversion(NamedTuple):
    folder: Path
    """Its name in the end, absolute."""
    model_type: str
    config: TransformerConfig
    tokenizer: ConvertedTokenizer | None
    """None: the folder has none."""
    parameter_names: tuple[str, ...]
    dtypes: tuple[str, ...]
    """Types of the weights, the most frequent first."""
    nbytes: int
    """Of all weights, as written."""
    difference: float | None
    """Largest difference of two logits, as a part of the largest logit; None: not compared."""
    notes: tuple[str, ...]
    """What the user should know, a line each."""


def convert_hf(
    source: Path,
    out: Path,
    *,
    name: str,
    add: Callable[[Conversion, Path], None],
    revision: str | None = None,
    options: ConvertOptions = AS_IT_IS,
) -> Conversion:
    """Write `out` from the folder `source`: `step0`, `tokenizer`, and what `add` adds.

    Args:
        out: must not exist, or be empty.
        name: of the model, as it is recorded.
        add: called with the unfinished folder when all else is in it.
        revision: recorded too.

    Raises CheckpointError where the folder is no model that we know, incomplete or damaged, the
    logits differ, or `out` is in use; ConfigError where the vocabulary would become smaller;
    DataError where its tokenizer cannot be used; ToolkitError where it cannot be written. Nothing
    is left then.
    """
    model = read_hf_config(source)
    weights, family, old = HFWeights(source), model.family, model.config.vocab_size
    notes = list(model.notes)
    with new_output(out) as unfinished:
        tokenizer_folder = unfinished / TOKENIZER_FOLDER
        tokenizer = _tokenizer(source, tokenizer_folder, family.model_type, options)
        if tokenizer is None:
            notes.append("there is no tokenizer in it; set dataset.tokenizer before training")
        config = model.config.replace(vocab_size=_vocab_size(old, tokenizer, options))
        known, new = _rows(source, tokenizer_folder, old)
        grown = len(new | set(range(old, config.vocab_size)))
        if grown:
            notes.append(f"{count(grown, 'row')} for new tokens: the mean of the others")
        plan = ImportPlan(
            family, config, weights, source_vocab_size=old, known_ids=known, new_ids=new
        )
        layout = {MODEL_PREFIX + name: tensor for name, tensor in plan.meta_tensors.items()}
        nbytes = sum(tensor.nbytes for tensor in layout.values())
        check_free_space(unfinished.parent, nbytes + SPARE_BYTES)
        dtypes: Counter[str] = Counter()
        for tensor in layout.values():
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        types = tuple(dtype for dtype, _ in dtypes.most_common())
        origin: dict[str, Any] = {
            "name": name,
            "model_type": family.model_type,
            "path": str(source.resolve()),
            "dtype": types[0],
            **({} if revision is None else {"revision": revision}),
            **_license(source),
        }
        if generation := read_json(source / GENERATION_FILE):
            origin["generation_config"] = generation
        extra = {
            "model": msgspec.to_builtins(config),
            "source": origin,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
        }
        save = Save(
            root=unfinished, step=0, tokens=0, engine="single", extra=extra, rank_state=dict
        )
        try:
            with byte_progress("converting", nbytes) as advance:
                shards = ShardWriter(None)
                tensors = watched(plan.tensors(), lambda tensor: advance(tensor.nbytes))
                prefixed = ((MODEL_PREFIX + name, tensor) for name, tensor in tensors)
                resolve = shards.stream(layout, prefixed)
                step = write_checkpoint(save, shards, resolve, rank=0, group=None)
        except TrainingError as error:
            reason = error.__cause__ or error
            raise TrainingError(f"{out}: not converted, nothing is left of it: {reason}") from error
        difference = None
        if options.validate or (options.validate is None and compare.has_memory_to_compare(config)):
            difference = _compare(source, config, step, sorted(known))
        elif options.validate is None:
            needed = compare.bytes_to_compare(config) / 1e9
            notes.append(
                f"not compared with transformers, for which {needed:.1f} GB of memory must be "
                "free; --validate does so all the same"
            )
        conversion = Conversion(
            folder=out.absolute(),
            model_type=family.model_type,
            config=config,
            tokenizer=tokenizer,
            parameter_names=tuple(plan.meta_tensors),
            dtypes=types,
            nbytes=nbytes,
            difference=difference,
            notes=tuple(notes),
        )
        add(conversion, unfinished)
    return conversion


def _tokenizer(
    source: Path, folder: Path, model_type: str, options: ConvertOptions
) -> ConvertedTokenizer | None:
    template = None
    if options.chat_template is not None:
        try:
            template = read_bytes(options.chat_template, DataError).decode()
        except (OSError, UnicodeDecodeError, DataError) as error:
            raise DataError(f"--chat-template {options.chat_template}: {error}") from None
    given = options.tokenizer
    if given is not None and not given.exists():
        raise DataError(f"--tokenizer {given}: no such file or folder; give a local one")
    found = convert_tokenizer(
        given or source,
        folder,
        add_tokens=options.add_tokens,
        chat_template=template,
        model_type=model_type,
    )
    if found is None and (given is not None or options.add_tokens or template is not None):
        raise DataError(f"{given or source}: holds no tokenizer; give one with --tokenizer")
    return found


def _vocab_size(old: int, tokenizer: ConvertedTokenizer | None, options: ConvertOptions) -> int:
    needed = max(old, tokenizer.vocab_size if tokenizer else 0)
    size = options.vocab_size or needed
    if size < old:
        raise ConfigError(
            f"--vocab-size {size}: the model has {old} token ids, of which none can be left out; "
            f"give at least {needed}"
        )
    if size < needed:
        raise ConfigError(
            f"--vocab-size {size}: the tokenizer has {needed} ids; give at least that many"
        )
    return size


def _rows(source: Path, tokenizer: Path, old: int) -> tuple[set[int], set[int]]:
    """Which of the model's `old` rows of the vocabulary stand for tokens of its own tokenizer, and
    the ids that only the new `tokenizer` has. Models often have more rows than tokens, up to a
    round number; they hold nothing that was trained."""
    everything, own = set(range(old)), token_ids(source)
    if not own & everything:
        return everything, set()
    return own & everything, token_ids(tokenizer) - own


def _compare(source: Path, config: TransformerConfig, step: Path, known: list[int]) -> float:
    """What was written, against the original, on the ids that both know."""
    tensors = iterate_tensors(step / TENSORS_FOLDER, MODEL_PREFIX)
    try:
        return compare.compare_with_transformers(
            source, config, tensors, known_ids=known, all_used=False
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nothing was written") from None


def _license(source: Path) -> dict[str, str]:
    """`license` and what belongs to it, from the metadata at the head of the model's own card."""
    try:
        text = read_bytes(source / "README.md", CheckpointError).decode()
        head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        found = load_yaml(head[1]) if head else None
    except (OSError, ValueError, CheckpointError):
        return {}
    if not isinstance(found, dict):
        return {}
    terms = found.get("license")
    if isinstance(terms, list):  # some cards name one in a list
        found["license"] = terms[0] if len(terms) == 1 else None
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found.get(name), str)}
