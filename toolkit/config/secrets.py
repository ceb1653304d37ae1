"""What looks like a secret, and how it is kept out of files.

One function masks: `mask_secrets`, for everything that only informs (command line, environment,
origins, logs, receipts, messages). A config is different, because a resume starts from it: a value
that is masked there would be lost. So a secret in a config is refused (`check_no_secrets`), and
`${NAME}` stands in its place (`interpolation.py`).
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from toolkit.config.types import join
from toolkit.errors import ConfigError

HIDDEN = "***"
_SHORTEST_VALUE = 8
"""Characters of a variable's value that is looked for in other texts."""

_PARTS = (
    "passw", "passphrase", "secret", "credential", "authorization", "signature", "bearer",
    "api_key", "apikey", "access_key", "private_key", "account_key", "auth_key", "encryption_key",
    "accesskey", "secretkey", "privatekey", "accountkey",
)  # fmt: skip
_CONTROLS = {
    "eos", "bos", "pad", "unk", "sep", "cls", "mask", "stop", "start", "end", "image", "audio",
    "video", "per", "next", "last", "first", "special", "added", "control", "each", "every",
}  # fmt: skip
"""What stands before "token" where that is a token of text."""
_PROSE = {
    "is", "in", "to", "or", "and", "of", "not", "was", "for", "must", "has", "variable",
    "environment", "no", "expected", "holds", "cannot", "unable", "could", "missing", "invalid",
}  # fmt: skip
"""Words of messages that come after a name, as in `source.token: no such field`."""

_EXCEPTION = re.compile(r"[A-Z]\w*[a-z](?:Error|Exception|Warning): ")
"""The class before a message, as in `NoCredentialsError: Unable to locate credentials`."""

_FOLDERS = ("PWD", "OLDPWD")
"""Variables of every shell, which hold the current folder and the one before."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SIGN = re.compile(
    r"(?<![\w.-])(?P<name>[\w.-]++)(?P<quote>[\"']?)\s*[=:]\s*(?:(?:Bearer|Basic)\s+)?",
    re.IGNORECASE,
)
_VALUE = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\s\"']+")
_QUERY_VALUE = re.compile(r"[^\s\"'&;#]+")
_SPACED = re.compile(
    r"(?P<name>(?<![\w.-])(?:--?[\w.-]+|[A-Z][A-Z0-9]*_[A-Z0-9_]+))\s+(?=[^\s=:-])"
)
_BEARER = re.compile(r"\b([Bb]earer\s+)(?!\$\{)[\w.~+/=-]{8,}")
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|(?<![\w-])eyJ[\w-]{10,}+\.[\w-]{10,}+\.[\w-]*)"
)
# A password may hold slashes; the last @ ends it then.
_URL = re.compile(r"(?<![\w+.-])(?P<scheme>[\w+.-]++)://(?P<rest>[^\s\"']+)")
_PORT = re.compile(r"\d{1,5}(?:/|\Z)")
_REFERENCE = re.compile(r"\$\{[A-Za-z_]\w*\}")
_HOOK = re.compile(
    r"(?:[\w.-]+\.)?(?:web)?hooks?\.[^/?#]+/|[^/?#]+/(?:[^?#]+/)?webhooks?/|api\.telegram\.org/bot"
)
"""The beginning of a URL at which messages are posted, as of hooks.slack.com, outlook.office.com or
discord.com: whoever knows the rest may post."""
_HOOK_SIGN = re.compile(
    r"(?P<before>(?:slack|webhook)(?:_?url)?[\"']?\s*[=:]\s*[\"']?)(?P<url>https?://[^\s\"'},]+)",
    re.IGNORECASE,
)


def is_secret_name(name: str, *, strict: bool = False) -> bool:
    """Whether a setting, option, variable or field of a URL of this name holds a secret; `strict`:
    no names that are common words elsewhere (`key`)."""
    words = [word.lower() for word in _WORD.findall(name)]
    joined = "_".join(words)
    if not words or name in _FOLDERS:
        return False
    if any(part in joined for part in _PARTS) or words[-1] in ("pwd", "pw"):
        return True
    if words[-1] == "token":
        return len(words) == 1 or words[-2] not in _CONTROLS
    return words[-1] in ("key", "sig", "sas") and not strict


def is_hook_name(name: str) -> bool:
    """Whether a setting or variable of this name holds the URL of a webhook, which is a secret from
    its path on: `webhook`, `SLACK_WEBHOOK`, `slack`."""
    return any(word.lower() in ("slack", "webhook", "webhooks") for word in _WORD.findall(name))


def mask_secrets(value: Any) -> Any:
    """`value` with `***` for whatever looks like a secret; mappings and lists, at any depth, are
    copied. `${NAME}` stays: it names a secret and holds none."""
    if isinstance(value, str):
        return _mask_text(value)
    if isinstance(value, Mapping):
        return {
            mask_secrets(key): (_hide if is_secret_name(str(key)) else mask_secrets)(
                _without_path(inner) if is_hook_name(str(key)) else inner
            )
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        before = (None, *value)
        return [
            _hide(inner) if isinstance(inner, str) and _is_option(option) else mask_secrets(inner)
            for option, inner in zip(before, value, strict=False)
        ]
    return value


def check_no_secrets(data: Any, path: str = "") -> None:
    """Refuse a config (plain JSON types) that holds a secret in a URL or under a name that says so.
    Raises ConfigError: naming the value's path and what to write instead."""
    if isinstance(data, dict):
        for name, value in data.items():
            below = join(path, name)
            is_text = isinstance(value, str) and value and not _is_reference(value)
            is_hook = is_text and is_hook_name(str(name)) and _without_path(value) != value
            if is_hook or (is_text and is_secret_name(str(name), strict=True)):
                raise ConfigError(f"{_ADVICE}: --{below}='${{NAME}}'", key=below)
            check_no_secrets(value, below)
    elif isinstance(data, list):
        for number, value in enumerate(data):
            check_no_secrets(value, join(path, number))
    elif isinstance(data, str) and "://" in data:
        shown = _URL.sub(lambda match: _mask_url(match, strict=True, hidden="${NAME}"), data)
        if shown != data:
            raise ConfigError(f"{_ADVICE}: --{path}='{shown}'", key=path)


_ADVICE = (
    "holds a secret, which the run folder would keep; put it into an environment variable, which "
    "is read at each start, and write its name"
)


def _is_reference(text: str) -> bool:
    """Whether `text` names variables and holds nothing else, or stands for what was masked."""
    return text == HIDDEN or ("${" in text and not re.search(r"\w", _REFERENCE.sub("", text)))


def _is_option(text: Any) -> bool:
    """Whether the argument after `text` is its value, and a secret."""
    if not isinstance(text, str):
        return False
    is_name = text.startswith("-") or (text.isupper() and "_" in text)
    return is_name and "=" not in text and " " not in text and is_secret_name(text)


def _without_path(value: Any) -> Any:
    """The URL of a webhook without what is secret of it; anything else as it is."""
    if not isinstance(value, str) or (match := _URL.fullmatch(value)) is None:
        return value
    host = re.split("[/?#]", match["rest"], maxsplit=1)[0]
    path = match["rest"][len(host) + 1 :]
    is_kept = path in ("", HIDDEN) or _REFERENCE.search(path)
    return value if is_kept else f"{match['scheme']}://{host}/{HIDDEN}"


def _hide(value: Any) -> Any:
    """Hide every text and number below a name that says it is a secret."""
    if isinstance(value, Mapping):
        return {mask_secrets(key): _hide(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(inner) for inner in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    return value if isinstance(value, str) and _is_reference(value) else HIDDEN


def _mask_text(text: str) -> str:
    if "://" in text:
        text = _URL.sub(lambda match: _mask_url(match, strict=False, hidden=HIDDEN), text)
    text = _HOOK_SIGN.sub(lambda match: match["before"] + _without_path(match["url"]), text)
    text = _mask_assigned(text)
    # `--token value` and `HF_TOKEN value`.
    text = _mask_after(_SPACED, text, lambda match, value: value.strip(",.;") in _PROSE)
    text = _KNOWN.sub(HIDDEN, _BEARER.sub(rf"\1{HIDDEN}", text))
    for name, value in os.environ.items():
        if len(value) < _SHORTEST_VALUE or value not in text:
            continue
        if is_secret_name(name) or (is_hook_name(name) and _without_path(value) != value):
            text = text.replace(value, HIDDEN)
    return text


def _mask_url(match: re.Match[str], *, strict: bool, hidden: str) -> str:
    """A URL with `hidden` for its password and for the values of secret fields of its query;
    `strict`: not for what may be a port and a path with an @ in it."""
    scheme, rest = match["scheme"], match["rest"]
    if scheme.startswith("http") and (hook := _HOOK.match(rest)) is not None:
        secret = rest[hook.end() :]
        if secret not in ("", HIDDEN) and not _REFERENCE.search(secret):
            return f"{scheme}://{hook[0]}{hidden}"
    user, at, place = rest.rpartition("@")
    name, colon, password = user.partition(":")
    if at and "/" not in name and "?" not in name:
        is_port = strict and _PORT.match(password) and "@" not in password.partition("/")[0]
        if colon and password and not is_port and not _is_reference(password):
            rest = f"{name}:{hidden}@{place}"
        elif not colon and len(name) >= 16 and scheme.startswith(("http", "git")):
            rest = rest if _is_reference(name) else f"{hidden}@{place}"
    before, mark, query = rest.partition("?")
    if mark:
        fields = re.split(r"([&;#])", query)
        rest = before + mark + "".join(_mask_field(field, hidden) for field in fields)
    return f"{scheme}://{rest}"


def _mask_field(field: str, hidden: str) -> str:
    name, sign, value = field.partition("=")
    if not value or _is_reference(value) or not is_secret_name(name):
        return field
    return f"{name}{sign}{hidden}"


def _mask_assigned(text: str) -> str:
    """`name=value`, `"name": "value"` and the like."""
    option = _SIGN.match(text.lstrip("-"))
    if text.startswith("-") and option and "=" in option[0] and is_secret_name(option["name"]):
        # One argument of a command line, to its end.
        first = len(text) - len(text.lstrip("-")) + option.end()
        rest = text[first:]
        return text if not rest or _is_reference(rest) else text[:first] + HIDDEN

    def is_kept(match: re.Match[str], value: str) -> bool:
        if match[0].endswith(": ") and value.lower() in _PROSE:
            return True
        if _EXCEPTION.match(match["name"].rpartition(".")[2] + match[0][len(match["name"]) :]):
            return True
        # A user called `key`, whose password is named and not written.
        return text[: match.start()].endswith("://") and _is_reference(value.split("@")[0])

    return _mask_after(_SIGN, text, is_kept)


def _mask_after(
    names: re.Pattern[str], text: str, is_kept: Callable[[re.Match[str], str], bool]
) -> str:
    """`text` without the values that follow the secret ones of `names`."""
    parts, done = [], 0
    for match in names.finditer(text):
        if match.start() < done or not is_secret_name(match["name"]):
            continue
        is_query = text[: match.start()].endswith(("?", "&", ";"))
        value = (_QUERY_VALUE if is_query else _VALUE).match(text, match.end())
        if value is not None and not _is_reference(value[0]) and not is_kept(match, value[0]):
            parts += [text[done : match.end()], HIDDEN]
            done = value.end()
    return "".join(parts) + text[done:]
