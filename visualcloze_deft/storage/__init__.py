"""Files that are whole or not there, locks, hashes, and text that users wrote. No torch."""
