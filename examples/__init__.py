"""Programs to read and to copy from; each module with a `main` is a command."""
