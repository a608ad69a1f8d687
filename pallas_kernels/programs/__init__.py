"""A leaf's step, as programs of XLA, of XLA for a CPU and of Mosaic GPU kernels."""
