"""Datasets described by a YAML file."""
