"""Check whether data are what they should be."""
