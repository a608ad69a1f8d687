"""The operations that other packages call, one module each."""
