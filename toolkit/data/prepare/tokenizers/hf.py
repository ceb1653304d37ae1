"""Tokenizers in Hugging Face format: a folder, a tokenizer.json, or a name on the hub."""

import contextlib
from pathlib import Path

from toolkit.data.prepare.tokenizers.backend import check_small_files
from toolkit.data.prepare.tokenizers.companions import (
    CHAT_TEMPLATE_FILE,
    COMPANION_FILES,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Files,
)
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, fast_config, load_file
from toolkit.data.tokenizer_config import HFTokenizerConfig
from toolkit.errors import DataError
from toolkit.storage.foreign import guard


def load_hf_tokenizer(config: HFTokenizerConfig) -> Tokenizer:
    """A tokenizer from a folder, a tokenizer.json file or the hub.

    Raises:
        DataError: when it cannot be found, or exists in no form that `tokenizers` can run.
    """
    path = Path(config.path).expanduser()
    tokens = {"eos_token": config.eos_token, "bos_token": config.bos_token}
    if path.is_file():
        return load_file(path, **tokens)
    if (path / TOKENIZER_FILE).is_file():
        return load_file(path / TOKENIZER_FILE, **tokens)
    if path.is_dir():
        return _load_with_transformers(str(path), config)
    if config.is_local:
        raise DataError(
            f"dataset.tokenizer.path: {config.path}: no such file or folder; "
            "give a tokenizer.json, a folder that holds one, or a hub name"
        )
    return _load_from_hub(config)


def _load_from_hub(config: HFTokenizerConfig) -> Tokenizer:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(config.path, TOKENIZER_FILE))
        for name in COMPANION_FILES[:4]:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(config.path, name)
        # Beside the others: both lie in the folder of one revision.
        snapshot_download(config.path, allow_patterns=[f"{TEMPLATES_FOLDER}/*.jinja"])
    except Exception as error:
        # The local kind means that the hub could not be asked, not that it has no such file.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return _load_with_transformers(config.path, config)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"dataset.tokenizer.path: {config.path}: no such local folder, and the hub gave none: "
            f"{reason}"
        ) from None
    return load_file(file, eos_token=config.eos_token, bos_token=config.bos_token)


def _load_with_transformers(name: str, config: HFTokenizerConfig) -> Tokenizer:
    """For folders that hold only an older format (vocab.json + merges.txt, ...)."""
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        check_small_files(Path(name), DataError)
    where = f"dataset.tokenizer.path: {config.path}"
    with guard(where, DataError, problem="no tokenizer that can be loaded"):
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"dataset.tokenizer.path: {config.path}: exists only as Python code, without a "
            "tokenizer.json; convert it first, or use another tokenizer"
        )
    eos_token = config.eos_token or loaded.eos_token
    bos_token = config.bos_token or loaded.bos_token
    files: Files = {TOKENIZER_CONFIG_FILE: fast_config(eos_token, bos_token)}
    templates = loaded.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    for name, text in templates.items():
        is_default = name == "default"
        files[CHAT_TEMPLATE_FILE if is_default else f"{TEMPLATES_FOLDER}/{name}.jinja"] = text
    return Tokenizer(backend, eos_token, files, bos_token=bos_token)
