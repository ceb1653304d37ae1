"""Which URLs name a place that can be used at all, told without a network."""

import re

EXTRAS = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "gdrive": "gdrive", "http": "http",
    "https": "http",
}  # fmt: skip
"""Protocols, and the extra of this package that each needs."""

_EXAMPLES = {"file": "/its/path", "local": "/its/path"}
_STORES_OF_OBJECTS = ("s3", "s3a", "gs", "gcs")
_MISREAD = re.compile(r"[?#]|//")
"""`?versionId=` and `#generation` name a version of one object, so that every file below would be
written to that object; what has an empty part in its name is listed under another one."""


def problem_of_place(url: str) -> str | None:
    """What is wrong with a `file://` URL that would mean a folder below the current one."""
    protocol, _, path = url.partition("://")
    if protocol not in ("file", "local") or path.startswith(("/", "${")):
        return None
    return f"{url}: a folder has three slashes, with its absolute path: {protocol}:///{path}"


def problem_of_store(url: str) -> str | None:
    """What is wrong with `url` as a place that is written to."""
    protocol, _, path = url.partition("://")
    if EXTRAS.get(protocol) == "http":
        return (
            f"{url}: {protocol}:// is for reading token files; what is kept needs a place "
            "that can be written: s3://, gs://, gdrive:// or file:///its/path"
        )
    if not path.strip("/"):
        return f"{url}: names no folder; write {protocol}://{_EXAMPLES.get(protocol, 'bucket')}/run"
    if protocol in _STORES_OF_OBJECTS and (sign := _MISREAD.search(path.rstrip("/"))):
        return (
            f"{url}: its path holds {sign[0]!r}, which stores read as something else; choose a URL "
            "without"
        )
    return problem_of_place(url)


def check_stores(config: object, *fields: str) -> None:
    """Raise ValueError for the first of the fields that is a URL with a `problem_of_store`."""
    for field in fields:
        url = getattr(config, field)
        if url is not None and "://" in url and (problem := problem_of_store(url)):
            raise ValueError(f"{field}: {problem}")


def problem_of_protocol(url: str) -> str | None:
    """What is wrong with a URL whose protocol nobody knows."""
    from fsspec import available_protocols

    protocol = url.partition("://")[0]
    if protocol in available_protocols():
        return None
    known = ", ".join(f"{name}://" for name in (*EXTRAS, "file"))
    return f"no such protocol: {protocol}://; there are {known}"
