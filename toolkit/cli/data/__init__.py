"""`toolkit data`: one module per verb."""
