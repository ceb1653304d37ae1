"""What a model can do: generation, and later perplexity and downstream tasks."""
