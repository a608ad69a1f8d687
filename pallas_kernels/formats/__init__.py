"""Storage of values: formats, rounding, packing and random bits, on arrays and on tiles."""
