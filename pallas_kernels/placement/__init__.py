"""Placement: the devices and the shards of a mesh that a program runs on."""
