"""Wiring of networks, samplers and tiling for each model family. Pipelines import base, never each other."""
