"""Optax's own suites, and Flax's behaviours, with our transformations in the place of Optax's."""
