"""Frozen models: their folders, precision, attention kernels and the names of their LoRAs."""
