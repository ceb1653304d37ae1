"""Moved to `token_files`."""

from toolkit.data.prepare.text.token_files import HEADER_BYTES as HEADER_BYTES
from toolkit.data.prepare.text.token_files import NumpyHeader as NumpyHeader
from toolkit.data.prepare.text.token_files import read_numpy_header as read_numpy_header
