"""A run: its folder, its data, its loop, and what it writes. DeepSpeed is used here alone."""
