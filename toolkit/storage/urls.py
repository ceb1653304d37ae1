"""Which URLs name a place that can be used at all, told without a network."""

EXTRAS = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "gdrive": "gdrive", "http": "http",
    "https": "http",
}  # fmt: skip
"""Protocols, and the extra of this package that each needs."""


def problem_of_place(url: str) -> str | None:
    """What is wrong with a `file://` URL that would mean a folder below the current one."""
    protocol, _, path = url.partition("://")
    if protocol not in ("file", "local") or path.startswith(("/", "${")):
        return None
    return f"{url}: a folder has three slashes, with its absolute path: {protocol}:///{path}"


def problem_of_store(url: str) -> str | None:
    """What is wrong with `url` as the place of a run, which is written to."""
    protocol = url.partition("://")[0]
    if EXTRAS.get(protocol) == "http":
        return (
            f"{url}: {protocol}:// is for reading token files; a run needs a place that can be "
            "written: s3://, gs://, gdrive:// or file:///its/path"
        )
    return problem_of_place(url)


def problem_of_protocol(url: str) -> str | None:
    """What is wrong with a URL whose protocol nobody knows."""
    from fsspec import available_protocols

    protocol = url.partition("://")[0]
    if protocol in available_protocols():
        return None
    known = ", ".join(f"{name}://" for name in (*EXTRAS, "file"))
    return f"no such protocol: {protocol}://; there are {known}"
