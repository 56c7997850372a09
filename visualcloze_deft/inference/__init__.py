"""The pipeline, its grid files, and `vcdeft infer`."""
