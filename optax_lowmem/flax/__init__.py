"""Training state for Flax loops."""
