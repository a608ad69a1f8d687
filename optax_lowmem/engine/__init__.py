"""How a step finds our members in a transformation, and steps their leaves."""
