"""Where long texts may be cut: at places where the word patterns of tokenizers cut by themselves.

Three kinds of places are sought, and the first kind that is near is taken:

1. before a single blank between two other characters: it begins a word in the patterns of GPT-2
   and all that came after it, and nothing is joined over it;
2. after a single line feed between two other characters: it ends a word, or is one. Before
   indentation or an empty line it would be joined with what follows; some patterns take a slash
   to it;
3. in writing without blanks, before a mark of punctuation between two letters: it is a word (GPT-2)
   or begins one (cl100k and later).

A text without any of them is cut between two characters, and the tokens there may differ from those
of the text in one piece.
"""

import re

NARROW = 1 << 11
"""Characters looked at first..."""
WIDE = 1 << 16
"""...and, where they have no good place, at most."""

_PLACES = (
    re.compile(r"(?<=\S)(?= \S)"),
    re.compile(r"(?<=\S\n)(?=[^\s/])"),
    re.compile(r"(?<=[^\W_])(?=[、。，．：；！？।،؛؟።၊][^\W_])"),
)


def last_cut(text: str, first: int, end: int) -> int | None:
    """The last good place after `first` and before `end`; None where none is near `end`."""
    for width in (NARROW, WIDE):
        start = max(first + 1, end - width)
        for kind in _PLACES:
            place = None
            for place in kind.finditer(text, start, end):  # noqa: B007
                pass
            if place is not None:
                return place.start()
        if start == first + 1:
            break
    return None


def first_cut(text: str, start: int) -> int | None:
    """The first good place from `start` on; None where there is none in `text`."""
    for kind in _PLACES:
        place = kind.search(text, start)
        if place is not None:
            return place.start()
    return None
