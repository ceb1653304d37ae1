"""Configs of text: where documents come from and which of them are taken."""

from typing import Literal

from toolkit.config import Config
from toolkit.config.base import check_positive
from toolkit.config.paths import LocalPath, NewName, PathOrURL


class FilesSourceConfig(Config, kw_only=True, tag_field="type", tag="files"):
    """Local text: .txt, .jsonl (plain, .gz, .zst), .json, .parquet or .arrow files."""

    paths: list[LocalPath]
    """Files, folders (searched recursively) or globs; order does not matter, names are sorted."""
    text_field: str = "text"
    """Column or key that holds the text (not in .txt)."""
    text_template: str | None = None
    """Text made of several columns, as in "{title}\\n\\n{body}"; replaces `text_field`. Braces that
    are meant as such are doubled."""
    suffixes: tuple[str, ...] = (
        ".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow",
    )  # fmt: skip
    """Endings taken from folders. Endings not known as a format are read as plain text, one
    document per file."""
    json_files: Literal["rows", "text"] = "rows"
    """What .json files are: rows (a list of objects, or an object a line), or one document each."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: stop, or replace with U+FFFD and count them."""
    max_line_bytes: int = 1 << 30
    """The longest line of a .jsonl file, unpacked; a longer one is an error."""

    def __post_init__(self) -> None:
        check_positive(self, "max_line_bytes")


class HubSourceConfig(Config, kw_only=True, tag_field="type", tag="hub"):
    """A data set of the Hugging Face hub (or any path `datasets.load_dataset` takes)."""

    name: str
    """Hub name or local path."""
    config: str | None = None
    """Configuration (subset) of the data set."""
    split: str = "train"
    """Split to read."""
    text_field: str = "text"
    """Column that holds the text."""
    text_template: str | None = None
    """Text made of several columns, as in "{title}\\n\\n{body}"; replaces `text_field`."""
    streaming: bool = True
    """Read without downloading the whole data set first."""


class DiskSourceConfig(Config, kw_only=True, tag_field="type", tag="disk"):
    """A folder that `datasets.Dataset.save_to_disk` wrote."""

    path: LocalPath
    """The folder."""
    split: str = "train"
    """Split to read where the folder holds several."""
    text_field: str = "text"
    """Column that holds the text."""
    text_template: str | None = None
    """Text made of several columns, as in "{title}\\n\\n{body}"; replaces `text_field`."""


class TokenFilesSourceConfig(Config, kw_only=True, tag_field="type", tag="token_files"):
    """Files of token ids without text: raw numbers, one after the other.

    `.bin` of nanoGPT's kind and the `.npy`-named files of OLMo's corpora have no header; a real
    numpy header is recognised and skipped.
    """

    paths: list[PathOrURL]
    """Files, folders or globs; local, or URLs (`s3://bucket/part-0.npy`), which are read by
    ranges."""
    dtype: Literal["uint8", "uint16", "uint32", "uint64"] = "uint16"
    """Type of the numbers; a numpy header must agree with it."""
    vocab_size: int | None = None
    """Every id is below this; default: the tokenizer's. Needed where `dataset.tokenizer` is
    null."""
    eos_id: int | None = None
    """Id that ends a document; default: the tokenizer's. Needed where `dataset.tokenizer` is
    null."""
    suffixes: tuple[str, ...] = (".bin", ".npy")
    """Endings taken from folders."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size")


class PythonStdlibSourceConfig(Config, kw_only=True, tag_field="type", tag="python_stdlib"):
    """Source code of the running interpreter's standard library: real text on every machine."""

    max_bytes: int | None = 10_000_000
    """Stop after this many bytes (files in sorted order by hash of their name); null: all."""


TextSourceConfig = FilesSourceConfig | HubSourceConfig | DiskSourceConfig | PythonStdlibSourceConfig
"""Sources that hold text, not tokens."""
SourceConfig = (
    FilesSourceConfig
    | HubSourceConfig
    | DiskSourceConfig
    | TokenFilesSourceConfig
    | PythonStdlibSourceConfig
)


class EvalSetConfig(Config, kw_only=True):
    """Text that is evaluated and never trained on, with the tokenizer and rows of `dataset`."""

    source: SourceConfig | None = None
    """Where its text comes from; null: its token files exist already."""
    dataset_name: NewName | None = None
    """First folder level of its token files; default: its name in `eval_sets`."""
    dataset_config: NewName | None = None
    """Second folder level; default: `dataset.dataset_config`."""
    instructions: "InstructionsConfig | None" = None
    """For rows that are conversations; null: it is plain text, whatever is trained on."""


class FiltersConfig(Config, kw_only=True):
    """Which documents are left out; they are counted in dataset.json."""

    min_characters: int | None = None
    """Shorter ones are left out."""
    max_characters: int | None = None
    """Longer ones are left out."""
    max_repetition: float | None = None
    """Documents that repeat themselves more than this are left out, on a scale from 0 (nothing is
    said twice) to 1; see `data/prepare/text/filters.py`. Works for any language and for code."""

    def __post_init__(self) -> None:
        check_positive(self, "min_characters", "max_characters")
        low, high = self.min_characters, self.max_characters
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_characters {low} is more than max_characters {high}")
        if self.max_repetition is not None and not 0.0 < self.max_repetition <= 1.0:
            raise ValueError(f"max_repetition must be in (0, 1]: {self.max_repetition}")


RowKind = Literal["conversations", "preference", "binary"]


class InstructionsConfig(Config, kw_only=True):
    """Rows are conversations or prompts with answers; the loss counts the answers."""

    kind: RowKind = "conversations"
    """What a row is. `conversations`: a conversation, or a prompt with its answer. `preference`: a
    prompt with a `chosen` and a `rejected` answer. `binary`: a `prompt` with a `completion` and a
    `label`, true where the completion is desirable."""
    shape: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt"] = "auto"
    """Columns of a row: `messages` (list of role and content), `prompt` and `completion`,
    `instruction`, `input` and `output`, or `conversations` (list of from and value). auto: told by
    the names of the first row's columns."""
    chat_template: str | None = None
    """Jinja text, or a file that holds it; default: the tokenizer's own template, and for
    tokenizers without one, prompt and completion are joined as they are."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """What the loss counts: all assistant turns (with their end-of-turn token), the last one, or
    every token (of preference and binary rows, every token after the prompt)."""
    system_prompt: str | None = None
    """Put before conversations that have no system message."""
    context_roles: tuple[str, ...] = ()
    """Roles of your own that the template knows; they are context. Other unknown roles are errors.
    """
    train_keys: tuple[str, ...] = ("weight", "train", "training", "trainable", "loss")
    """Keys of a turn that say whether it is trained on: 0 or false leaves it out of the loss."""
    mask_keys: tuple[str, ...] = ("mask", "masked", "ignore")
    """Keys that say the opposite: 1 or true leaves the turn out of the loss."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of a turn that mean nothing here, though their names look as if they masked."""

    def __post_init__(self) -> None:
        if self.kind != "conversations" and self.shape != "auto":
            raise ValueError(
                f"shape {self.shape} goes with kind=conversations; leave it out with "
                f"kind={self.kind}, whose columns are always the same"
            )
