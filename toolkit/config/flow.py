"""YAML of the command line, and of other files: what values need of it, and no more.

Anchors, aliases and tags are refused: a value can then be no larger than its text, and is a tree.
"""

from typing import Any

import yaml

from toolkit.config.files import DEEPEST
from toolkit.config.types import shown
from toolkit.storage.foreign import nesting


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise ValueError(
                f"anchors and aliases are not taken ({sign}{event.anchor}); write it out"
            )
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"tags are not taken ({event.tag}); leave it out")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError("a name in a mapping must be text")
            if key.value in seen:
                raise ValueError(f"the key {shown(key.value)} stands twice in one mapping")
            seen.add(key.value)
        return node


def compose(text: str) -> Any:
    """The node of YAML `text`; None where it holds nothing.

    Raises:
        ValueError: it is not YAML, or uses what a config value does not need.
    """
    return _read(yaml.compose, text)


def load(text: str) -> Any:
    """The value of YAML `text` that may come from elsewhere; raises as `compose` does."""
    return _read(yaml.load, text)


def _read(read: Any, text: str) -> Any:
    if nesting(text.encode("utf-8", "surrogatepass")) > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    try:
        return read(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", "cannot be read")
        raise ValueError(problem) from None
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
