"""Base models: their files, their weights, and how they are opened."""
