"""A run as a repository of the hub: its files, its model card, the upload."""
