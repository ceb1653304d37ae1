"""Which errors of a store pass by themselves, and what each says in one line."""

import errno
from collections.abc import Iterator

_LONGEST = 300
"""Characters of an exception's text that are said."""
_PASSING_STATUS = {408, 425, 429}
"""HTTP: too slow, too early, too many; besides everything from 500 on."""
_PASSING_NUMBERS = {
    errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE,
    errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EREMOTEIO,
}  # fmt: skip
_PASSING_NAMES = {
    "ConnectionError",  # botocore, requests
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "HTTPClientError",  # botocore
    "IncompleteReadError",
    "ResponseStreamingError",
    "IncompleteRead",  # urllib3, http.client
    "ProtocolError",
    "ChunkedEncodingError",
    "TransportError",  # google.auth
}
"""Classes (or their bases) that mean a broken connection; by name, for their libraries may not be
installed."""
_PERMANENT = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError,
)  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: timeouts, broken connections, HTTP 5xx and 429."""
    if isinstance(error, _PERMANENT):
        return False
    for cause in _causes(error):
        status = _http_status(cause)
        if status is not None:
            return status >= 500 or status in _PASSING_STATUS
        if isinstance(cause, TimeoutError | ConnectionError):
            return True
        if isinstance(cause, OSError) and cause.errno in _PASSING_NUMBERS:
            return True
        if any(base.__name__ in _PASSING_NAMES for base in type(cause).__mro__):
            return True
    return False


def reason_of(error: BaseException) -> str:
    """The error in one line, named by its class where the text alone says little."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."  # some quote what they got
    if isinstance(error, PermissionError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def message_of(doing: str, where: str, error: Exception) -> str:
    """What an error that does not pass says of a place, in one line."""
    reason = reason_of(error)
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return f"{doing} {where}: not allowed: {reason}; check credentials and permissions"
    return f"{doing} {where}: {reason}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those it was raised from, at most a few."""
    current: BaseException | None = error
    for _ in range(5):
        if current is None:
            return
        yield current
        current = current.__cause__


def _http_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # aiohttp, gcsfs
        status = getattr(error, "status", None) or getattr(error, "code", None)
    try:
        return int(status)
    except (TypeError, ValueError):
        return None
