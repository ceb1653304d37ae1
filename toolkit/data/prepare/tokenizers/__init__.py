"""From text to ids: one small class, and one module for each kind of tokenizer."""
