"""Where a program runs: on which device, on which shards of a mesh."""
