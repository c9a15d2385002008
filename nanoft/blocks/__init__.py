"""Parts of a model, or of its training, that are more than a switch of the core."""
