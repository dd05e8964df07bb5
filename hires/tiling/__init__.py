"""Exact integer tiles, blending, out-of-memory retry, and the exact tiled VAE."""
