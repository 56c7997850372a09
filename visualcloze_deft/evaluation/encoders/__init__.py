"""Image and text encoders that metrics use, by name."""
