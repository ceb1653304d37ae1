"""Models: nn.Modules that know nothing of parallelism, and configs that import no torch."""
