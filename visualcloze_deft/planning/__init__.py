"""Memory that a run needs, known before any weight is read."""
