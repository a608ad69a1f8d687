"""Programs to read and to copy from. Each module with a `main` is a command."""
