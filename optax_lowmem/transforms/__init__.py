"""The Optax transformations."""
