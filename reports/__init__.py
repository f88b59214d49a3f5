"""Figures of runs and datasets, and reports of many runs and of sweeps.

Only the command line imports this package; it passes the drawing functions to runs.
"""
