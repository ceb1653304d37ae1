"""The tokenizer of a Hugging Face folder, copied, and changed where that was asked for."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.data.prepare.build.stops import SPECIAL_IDS, special_ids, stop_ids
from toolkit.data.prepare.tokenizers.auto import load_auto_tokenizer, make_portable, settle
from toolkit.data.prepare.tokenizers.backend import check_size, read_backend
from toolkit.data.prepare.tokenizers.companions import (
    CHAT_TEMPLATE_FILE,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    companions_of,
    has_tokenizer,
    read_json,
)
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.errors import DataError
from toolkit.storage.atomic import PathLike, write_atomic, write_json_atomic

GENERATION_FILE = "generation_config.json"


class ConvertedTokenizer(NamedTuple):
    vocab_size: int
    """Every id is below this."""
    starts_with_bos: bool
    """Whether the original puts its start-of-document token before a text."""
    new_tokens: tuple[str, ...]
    """Of the added tokens those that it did not have."""


def convert_tokenizer(
    source: Path,
    folder: Path,
    *,
    add_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    model_type: str | None = None,
) -> ConvertedTokenizer | None:
    """Make `folder` a tokenizer folder from what `source` holds; None where it holds none.

    Formats older than tokenizer.json become one through `transformers`. `AutoTokenizer` gives the
    same ids of the result as its tokenizer.json does. Raises DataError where it cannot be read,
    exists as Python code only, or `AutoTokenizer` cannot be brought to give its ids.

    Args:
        source: a folder, or a tokenizer.json.
        add_tokens: control tokens that it must have; each new one gets the next id.
        chat_template: Jinja text in the place of its own.
    """
    source = source.parent if source.is_file() else source
    if not has_tokenizer(source):
        return None
    try:
        if (source / TOKENIZER_FILE).is_file():
            folder.mkdir()
            copy_tokenizer(source, folder)
        else:
            load_auto_tokenizer(source).save_pretrained(folder)
        if not (folder / TOKENIZER_FILE).is_file():
            raise DataError(
                f"{source}: its tokenizer exists only as Python code, without a {TOKENIZER_FILE}; "
                "give another with --tokenizer"
            )
        new_tokens = _add_tokens(folder, add_tokens)
        if chat_template is not None:
            config = read_json(folder / TOKENIZER_CONFIG_FILE)
            if config.pop("chat_template", None) is not None:
                write_json_atomic(folder / TOKENIZER_CONFIG_FILE, config)
            write_atomic(folder / CHAT_TEMPLATE_FILE, chat_template.encode())
            shutil.rmtree(folder / TEMPLATES_FOLDER, ignore_errors=True)  # it is the only one now
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_templates  # noqa: B018 # reads their files
        settle(folder, where=str(source), model_type=model_type)
        return ConvertedTokenizer(tokenizer.vocab_size, tokenizer.adds_bos, new_tokens)
    except DataError as error:
        # `folder` is a copy that nobody knows.
        text = str(error).replace(str(folder), str(source))
        raise DataError(text if str(source) in text else f"{source}: {text}") from None


def token_ids(source: Path) -> set[int]:
    """Every id that stands for a token, of the tokenizer in `source`; empty where there is none.
    Raises DataError: it cannot be read."""
    source = source.parent if source.is_file() else source
    if (source / TOKENIZER_FILE).is_file():
        return set(_backend(source).get_vocab(with_added_tokens=True).values())
    return set(load_auto_tokenizer(source).get_vocab().values()) if has_tokenizer(source) else set()


def copy_tokenizer(source: PathLike, folder: Path) -> None:
    """Copy tokenizer.json and what belongs to it, the chat template among it; see also
    `make_portable`."""
    for name in (TOKENIZER_FILE, *companions_of(Path(source))):
        (folder / name).parent.mkdir(exist_ok=True)
        check_size(Path(source) / name, DataError)
        shutil.copyfile(Path(source) / name, folder / name)
    make_portable(folder)


def add_tokenizer(
    folder: Path,
    tokenizer_folder: PathLike | None,
    generation: Mapping[str, Any] | None,
    *,
    scored_below: int | None = None,
) -> dict[str, Any]:
    """Put the tokenizer into an exported `folder`, and a generation_config.json that ends texts as
    training taught; returns its content. Raises DataError: `tokenizer_folder` holds no tokenizer.

    Args:
        tokenizer_folder: None: there is none, and the ids stay what they were.
        generation: that of the model that training began from; None: there was none.
        scored_below: ids of a reward model are below this, and the token that fills up rows of a
            batch is that of `scoring_pad`; None: of a language model.
    """
    settings = dict(generation or {"_from_model_config": True, **dict.fromkeys(SPECIAL_IDS)})
    if tokenizer_folder is not None:
        if not (Path(tokenizer_folder) / TOKENIZER_FILE).is_file():
            raise DataError(
                f"{tokenizer_folder}: no {TOKENIZER_FILE} here; give the folder of the tokenizer, "
                "or none to export weights alone"
            )
        tokenizer = load_tokenizer(tokenizer_folder)
        settings |= special_ids(tokenizer, generation)
        copy_tokenizer(tokenizer_folder, folder)
        if scored_below is not None:
            pad = scoring_pad(tokenizer, generation, scored_below)
            settings["pad_token_id"] = None if pad is None else tokenizer.control_tokens[pad]
            config = read_json(folder / TOKENIZER_CONFIG_FILE) | {"pad_token": pad}
            write_json_atomic(folder / TOKENIZER_CONFIG_FILE, config, sync=False)
    write_json_atomic(folder / GENERATION_FILE, settings, sync=False)
    return settings


def scoring_pad(
    tokenizer: Tokenizer, generation: Mapping[str, Any] | None, vocab_size: int
) -> str | None:
    """The control token that fills up rows of a batch of a reward model, which `transformers`
    scores at the last token that is another one: the tokenizer's own or that of the model that
    training began from, else one that is called so, else any. None: all of them end texts."""
    before, ends = (generation or {}).get("pad_token_id"), stop_ids(tokenizer, generation)
    usable = {
        name: number
        for name, number in tokenizer.control_tokens.items()
        if number < vocab_size and number not in ends
    }

    def rank(name: str) -> tuple[bool, ...]:
        own = usable[name] in (tokenizer.pad_id, before)
        # The start of texts means nothing at their end.
        return not own, "pad" not in name.lower(), "unk" not in name.lower(), name != bos

    bos = tokenizer.bos_token
    return min(usable, key=rank, default=None)


def _add_tokens(folder: Path, tokens: Sequence[str]) -> tuple[str, ...]:
    from tokenizers import AddedToken

    if not tokens:
        return ()
    backend = _backend(folder)
    known = backend.get_vocab(with_added_tokens=True)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    backend.save(str(folder / TOKENIZER_FILE))
    config = read_json(folder / TOKENIZER_CONFIG_FILE)
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        # Where it lists any, `transformers` believes it rather than tokenizer.json.
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for token in tokens:
            entry = {"content": token, **flags, "special": True}
            listed[str(backend.token_to_id(token))] = entry
        write_json_atomic(folder / TOKENIZER_CONFIG_FILE, config)
    return tuple(token for token in dict.fromkeys(tokens) if token not in known)


def _backend(folder: Path) -> Any:
    return read_backend(folder / TOKENIZER_FILE, read_json(folder / TOKENIZER_CONFIG_FILE))
