"""Tasks with choices: which continuation of a context a model finds likely."""
