"""Unsupervised domain adaptation for segmentation, measured so that it can be trusted."""

__version__ = "0.1.0"
