"""Attention, blending and normalisation kernels; imports nothing of hires."""
