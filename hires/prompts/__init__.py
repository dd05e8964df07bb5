"""Prompts as text: weights, scheduling, chunks of tokens. Imports no torch."""
