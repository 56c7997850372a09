"""The DEFT layer (arXiv 2509.22793)."""
