"""What other packages call: one module an operation."""
