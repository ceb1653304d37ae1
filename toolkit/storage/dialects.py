"""What differs between stores, and between the libraries that talk to them."""

import base64
import re
from typing import Any

PART = 5 << 20
"""Bytes of one part of an upload, at least; S3 takes no smaller ones."""
STREAMS = 4
"""Requests in flight for one file, where the library can."""
MAX_PARTS = 9_000
"""S3 takes 10,000 parts a file at most."""


def knows_no_condition(error: BaseException) -> bool:
    """Whether the store, or its library, has no way to write only where nothing is."""
    code = getattr(error.__cause__ or error, "response", None)
    if isinstance(code, dict):
        return code.get("Error", {}).get("Code") == "NotImplemented"
    return isinstance(error, TypeError | NotImplementedError)


def is_lost_upload(error: BaseException) -> bool:
    """Whether S3 no longer knows the parts of an upload: its end came through and its answer did
    not, or the bucket's rules have removed them. Sent again, it works."""
    answer = getattr(error.__cause__ or error, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") == "NoSuchUpload"


def md5_of(entry: dict[str, Any]) -> str | None:
    if "md5Hash" in entry:  # GCS
        return base64.b64decode(entry["md5Hash"]).hex()
    etag = str(entry.get("ETag", "")).strip('"')  # S3; of several parts it is no MD5, and longer
    return etag if re.fullmatch("[0-9a-f]{32}", etag) else None


def upload_options(filesystem: Any, size: int) -> dict[str, int]:
    """Part size and parallel parts, under the names that the library of this store has for them."""
    protocols = protocols_of(filesystem)
    part = max(PART, -(-size // MAX_PARTS))
    if protocols & {"s3", "s3a"}:
        return {"chunksize": part, "max_concurrency": min(STREAMS, max(1, STREAMS * PART // part))}
    if protocols & {"gs", "gcs"}:
        return {"chunksize": -(-part >> 18) << 18}  # whole units of 256 KiB
    return {}


def protocols_of(filesystem: Any) -> set[str]:
    protocol = filesystem.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)


def version_of(info: dict[str, Any]) -> str:
    """What fsspec's `info` of a file has to tell its content from another one."""
    for key in ("ETag", "etag", "generation", "md5Checksum", "Last-Modified", "mtime"):
        if info.get(key):
            return str(info[key]).strip('"')
    return ""
