"""How batches pass through a model, and what is measured on the way."""
