"""Attention, blending and normalisation kernels with references; imports nothing of hires."""
