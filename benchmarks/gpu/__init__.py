"""Pieces of the GPU suite and what it records."""
