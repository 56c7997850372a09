"""Run files and comparison files, checked, as frozen settings. No torch."""
