"""One experiment: its config, loading it, summarising it, running it."""
