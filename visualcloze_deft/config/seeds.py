"""Seeds of what is asked and never trained on."""

from __future__ import annotations

OTHER_SCENES = 1_000_003  # added to the seed: scenes that training does not draw
