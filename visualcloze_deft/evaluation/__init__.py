"""What is measured of images, and how sure a figure is."""
