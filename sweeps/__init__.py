"""Search over configurations: definitions and workers (see the open issue on sweeps)."""
