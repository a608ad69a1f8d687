"""Names, formats and variables of the leaves of pytrees."""
