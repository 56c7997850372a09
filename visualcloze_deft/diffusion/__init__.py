"""The process that training inverts: rectified flow."""
