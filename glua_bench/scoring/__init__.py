"""Metrics, evaluation and selectors."""
