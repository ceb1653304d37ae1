"""Tokenizer folders as `transformers` reads them: with the ids that data is made of.

Data is encoded by tokenizer.json alone. `AutoTokenizer` makes a tokenizer of the class that
tokenizer_config.json or the model's type names, and some classes bring rules of their own in the
place of those in tokenizer.json. Both are compared once, on text that is hard for tokenizers. Where
they differ, the folder gets the class that takes tokenizer.json as it is (`settle`).
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from toolkit.data.prepare.tokenizers.backend import (
    MAX_TOKENIZER_BYTES,
    check_small_files,
    check_tokenizer_file,
)
from toolkit.data.prepare.tokenizers.companions import (
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    has_tokenizer,
    read_json,
)
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.errors import DataError
from toolkit.storage.atomic import write_json_atomic
from toolkit.storage.foreign import decode_json, guard, read_bytes

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""Takes tokenizer.json as it is, in every release of `transformers`."""

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MORE = ("additional_special_tokens", "extra_special_tokens")
_RULES = (
    "auto_map", "backend", "fix_mistral_regex", "from_slow", "split_special_tokens",
    "tokenizer_file", "tokenizer_type", "use_fast",
)  # fmt: skip
"""Settings that choose another class than the one named, or change how text is cut."""

HARD_TEXTS = (
    "The year 2024, naïve café: x += 1;\n\tdef f(a, b):  return a*b  # 你好 🙂",
    "\n\nhello\n\n\nworld 650841823 2023",
    *("\n" * count for count in (1, 2, 3, 5, 8)),
    *(" " * count + "x" for count in range(1, 10)),
    "a\n b\n  c\n\n   d\r\ne\r\rf\t\tg \t h  \n  \n\n i   ",
    "\v\fline\u0085sep\u2028para\u2029end\u00a0nbsp\u3000wide\u200bzero\u200djoined\ufeffmark",
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 0x1F 1e-9 ½ ² ٣٤٥ १२३ 一二三",
    "don't WE'LL I'M you're they've he'd it's O'Neil ’tis l’été 'quoted' \"double\" ``tex''",
    "camelCase snake_case SCREAMING_CASE kebab-case path/to/file.py?x=1&y=2#z @user me@x.org",
    "!!! ??? ... --- === *** /// \\\\ {}[]()<> <br/> $x^2$ %d #### |a|b| ~~~ ;;",
    "Straße ǅ ﬁ ﬂ ① Å Å é é ñ ñ 가 가 ｆｕｌｌ ＷＩＤＴＨ İı ſ",
    "Русский текст, ελληνικά, עברית, العربية, हिन्दी, ไทย, 日本語テキスト, 한국어, ქართული, አማርኛ",
    "👍🏽 👩‍👩‍👧‍👦 🇳🇴 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 😀😀",
    "\x00\x01\x07\x1b[0m\x7f\x80\x9f \ufffd \ue000 \U0010fffd \u202eabc\u202c",
    " leading and trailing ", "", "a", " ", "\n",
)  # fmt: skip
"""What tokenizers cut in different ways: runs of newlines and spaces, digits, contractions,
scripts, characters composed of several, emoji, control characters."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No log lines below errors, no bars and no warnings from `transformers` inside."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()


def load_auto_tokenizer(source: Path | str) -> Any:
    """The tokenizer of a folder, or of a name on the hub, as `transformers` has it, with its chat
    template. A tokenizer.json alone decides the ids, as it does for data. Raises DataError: there
    is none, or `transformers` cannot load it."""
    is_fast, is_folder = False, isinstance(source, Path)
    if isinstance(source, Path):
        if not source.is_dir() or not has_tokenizer(source):
            raise DataError(f"{source}: no tokenizer here; give one with --tokenizer FOLDER")
        check_small_files(source, DataError)
        is_fast = (source / TOKENIZER_FILE).is_file()
        if is_fast:
            check_tokenizer_file(source / TOKENIZER_FILE)
    with quiet_transformers():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        kind: Any = PreTrainedTokenizerFast if is_fast else AutoTokenizer
        with guard(source, DataError, problem="its tokenizer cannot be loaded"):
            return kind.from_pretrained(source, trust_remote_code=False, local_files_only=is_folder)


def settle(folder: Path, *, where: str, model_type: str | None = None) -> str:
    """Make a tokenizer folder one that `AutoTokenizer` reads with the ids of its tokenizer.json, by
    changing its tokenizer_config.json; returns the release of `transformers` that was asked.
    DataError, which names `where`, if it cannot be read that way. The class may depend on the
    `model_type` of the model that it goes with."""
    import transformers

    make_portable(folder)
    reason = difference(folder, model_type)
    if reason is not None or _class_is_unknown(folder):
        use_plain_class(folder)
        reason = difference(folder, model_type)
    if reason is not None:
        raise DataError(f"{where}: {reason}; give a tokenizer of the model's own kind")
    return transformers.__version__


def difference(folder: Path, model_type: str | None = None) -> str | None:
    """How the tokenizer that `AutoTokenizer` makes of `folder` differs from its tokenizer.json, in
    a line; None: it does not. Without `model_type`, a config.json in `folder` says it."""
    ours = load_tokenizer(folder)
    settings: dict[str, Any] = {}
    with quiet_transformers():
        from transformers import AutoConfig, AutoTokenizer

        try:
            with guard("AutoTokenizer", DataError, problem="cannot use it"):
                if model_type is not None:
                    settings["config"] = AutoConfig.for_model(model_type)
                theirs: Any = AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True, **settings
                )
                kind = f"AutoTokenizer, which chose {type(theirs).__name__},"
                return _difference(ours, theirs, kind)
        except DataError as error:
            return str(error)


def _difference(ours: Tokenizer, theirs: Any, kind: str) -> str | None:
    names = list(ours.control_tokens)
    plain = [text for text in HARD_TEXTS if not any(name in text for name in names)]
    controls = [text for name in names[:_MOST_NAMES] for text in (f"a {name}b", f"{name}\n {name}")]
    encoded = ours.encode_offsets(controls, special_tokens=True)
    all_ids = [*ours.encode_batch(plain), *(ids for ids, _ in encoded)]
    for text, ids in zip([*plain, *controls], all_ids, strict=True):
        expected = ids.tolist()
        found = theirs(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            numbered = enumerate(zip(found, expected, strict=False))
            shorter = min(len(found), len(expected))
            first = next((n for n, (one, other) in numbered if one != other), shorter)
            part = slice(max(first - 2, 0), first + 4)
            return (
                f"{kind} makes {found[part]} of a part of {text[:20]!r}, the training data has "
                f"{expected[part]}"
            )
    largest = max(theirs.get_vocab().values(), default=-1)
    if largest >= ours.vocab_size:
        return f"{kind} has ids up to {largest}, tokenizer.json up to {ours.vocab_size - 1}"
    templates = theirs.chat_template
    named = {"default": templates} if isinstance(templates, str) else templates or {}
    if named != ours.chat_templates:
        return f"{kind} does not keep the chat template"
    return None


_MOST_NAMES = 64
"""Control tokens that are looked at: some vocabularies reserve hundreds."""


def _class_is_unknown(folder: Path) -> bool:
    """Whether `AutoTokenizer` puts the plain class in the place of the one that is named; version 4
    refuses such a name."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = read_json(folder / TOKENIZER_CONFIG_FILE).get("tokenizer_class")
    return isinstance(name, str) and tokenizer_class_from_name(name) is None


def make_portable(folder: Path) -> None:
    """Spell the files beside tokenizer.json so that transformers 4.57 reads in them what 5 does;
    files that say it already stay as they are."""
    config = read_json(folder / TOKENIZER_CONFIG_FILE)
    if not config:
        return
    changed = dict(config)
    if str(config.get("tokenizer_class")).endswith("Backend"):
        # What 5 calls the classes without rules of their own, and 4 does not know.
        changed["tokenizer_class"] = PLAIN_CLASS
        changed.pop("backend", None)
    if isinstance(config.get("extra_special_tokens"), list):
        # 4 takes a mapping under this name, and the list under the other.
        tokens = [*(config.get(_MORE[0]) or []), *changed.pop(_MORE[1])]
        changed[_MORE[0]] = [t for n, t in enumerate(tokens) if t not in tokens[:n]]
    is_plain = changed.get("tokenizer_class") == PLAIN_CLASS
    if is_plain and _pre_tokenizer(folder).get("add_prefix_space") is True:
        # 4 puts this, false by default, in the place of what tokenizer.json says.
        changed["add_prefix_space"] = True
    if changed != config:
        write_json_atomic(folder / TOKENIZER_CONFIG_FILE, changed)
    # 4 lets this file win over the other, which is the one that is changed when data is prepared.
    named = read_json(folder / SPECIAL_TOKENS_FILE)
    agreeing = dict(named)
    for name in set(_NAMED) & named.keys():
        if changed.get(name) is not None and _text(changed[name]) != _text(named[name]):
            agreeing[name] = changed[name]
    if agreeing != named:
        write_json_atomic(folder / SPECIAL_TOKENS_FILE, agreeing)


def use_plain_class(folder: Path) -> None:
    """Have tokenizer.json alone decide the ids."""
    config = read_json(folder / TOKENIZER_CONFIG_FILE)
    changed = {name: value for name, value in config.items() if name not in _RULES}
    changed["tokenizer_class"] = PLAIN_CLASS
    changed["add_prefix_space"] = _pre_tokenizer(folder).get("add_prefix_space") is True
    tokenizer = load_tokenizer(folder)
    named = read_json(folder / SPECIAL_TOKENS_FILE)
    for settings in (changed, named):
        # `transformers` would add what the vocabulary lacks, with ids that the model does not have.
        for name in set(_NAMED) & settings.keys():
            if settings[name] is not None and tokenizer.id_of(_text(settings[name])) is None:
                del settings[name]
        for name in _MORE:
            tokens = settings.get(name)
            if isinstance(tokens, list):
                settings[name] = [t for t in tokens if tokenizer.id_of(_text(t)) is not None]
    write_json_atomic(folder / TOKENIZER_CONFIG_FILE, changed)
    if named:
        write_json_atomic(folder / SPECIAL_TOKENS_FILE, named)


def _pre_tokenizer(folder: Path) -> dict[str, Any]:
    """That of tokenizer.json, as far as it is one alone."""

    class Content(msgspec.Struct):
        pre_tokenizer: dict[str, Any] | None = None

    with contextlib.suppress(FileNotFoundError, DataError):
        data = read_bytes(folder / TOKENIZER_FILE, DataError, max_bytes=MAX_TOKENIZER_BYTES)
        return decode_json(data, TOKENIZER_FILE, DataError, Content).pre_tokenizer or {}
    return {}


def _text(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)
