"""Base model, rows and benchmark items: where they come from and how they are read."""
