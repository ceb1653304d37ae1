"""Moved to `reading`."""

from toolkit.data.prepare.text.reading import Piece as Piece
from toolkit.data.prepare.text.reading import at_found_place as at_found_place
