"""Compiles a training step for a device that need not be there, and reads its memory."""
