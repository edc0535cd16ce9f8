"""Regularizers, which go on top of any method that they can serve, one file each."""
