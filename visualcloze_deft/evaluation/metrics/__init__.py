"""Pure functions of images, features and boxes."""
