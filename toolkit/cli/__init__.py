"""The command line: one module per verb; each parses, calls one function, prints."""

from toolkit import signals

# The parts of the command line take a moment to import.
signals.leave_until_listening()
