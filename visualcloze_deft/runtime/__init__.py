"""Processes, GPUs, signals and open files."""
