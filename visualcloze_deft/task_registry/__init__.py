"""Task files, and the tasks that a user means. No torch."""
