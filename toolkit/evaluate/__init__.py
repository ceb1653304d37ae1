"""What a model can do: loss and perplexity on text, generation."""
