"""How values are stored: formats, rounding, packing, random bits, on arrays and on tiles."""
