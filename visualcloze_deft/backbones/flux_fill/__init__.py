"""FLUX.1-Fill: its seven components as one value, and how they are loaded."""
