"""From documents to token files: readers, tokenizers, building, storing, looking at them."""
