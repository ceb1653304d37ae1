"""To and from the folders that `transformers` reads."""
