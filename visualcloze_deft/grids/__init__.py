"""Rows of pictures and words, before any model: cell sizes, strips, prompts."""
