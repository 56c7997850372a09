"""Roles that a model computes from a source's targets."""
