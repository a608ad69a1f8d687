"""Checkpoints in other formats, and where the bytes are."""
