"""Datasets, one per file, registered through entry points."""
