"""Gradient release: the backward pass applies the optimizer."""
