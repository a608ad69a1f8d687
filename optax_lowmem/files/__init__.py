"""Checkpoints in other file formats, and a table of the memory that a state takes."""
