"""One adaptation method a file; each registers through an entry point."""
