"""Code that travels with an exported model; nothing here imports it."""
