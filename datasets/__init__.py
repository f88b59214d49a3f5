"""One dataset a file; each registers through an entry point."""
