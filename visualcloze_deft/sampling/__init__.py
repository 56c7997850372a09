"""Examples to tokens, and tokens to images."""
