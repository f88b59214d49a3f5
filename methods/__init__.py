"""Adaptation methods, one per file, registered through entry points."""
