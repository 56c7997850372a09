"""Sources of items, roles computed from others, and the mixture of examples."""
