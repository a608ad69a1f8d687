"""The leaves of pytrees: their names, formats and NNX variables."""
