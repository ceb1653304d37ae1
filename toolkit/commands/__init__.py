"""What a verb does that is not training itself; one function each, called by `cli/`."""
