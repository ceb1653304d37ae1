"""From documents to token files: tokenizers, preparation, store and cache."""
