"""Moved to `template`."""

from toolkit.data.prepare.text.instructions.template import NamedTemplates as NamedTemplates
