"""Reads tensors from files, and widens weights that a file stores in 8 or 4 bits, one at a time."""
