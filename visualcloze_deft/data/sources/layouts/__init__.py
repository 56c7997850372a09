"""How a user's own pictures may lie in a folder: one module for each layout of `folder`."""
