"""Reading pictures upright, in sRGB, in the sense of their role."""
