"""Measures of finished images: seams, duplicates, spectrum, fidelity."""
