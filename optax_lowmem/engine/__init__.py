"""Finds our members in a transformation and steps their leaves."""
