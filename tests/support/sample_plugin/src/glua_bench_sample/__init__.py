"""Plugins for glua-bench in a distribution of their own."""
