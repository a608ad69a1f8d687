"""The step of a leaf as three programs: XLA, XLA for one CPU, and Mosaic GPU kernels."""
