"""Parts of a model or of its training that need more than a switch in the core."""
