"""What Flax loops use."""
