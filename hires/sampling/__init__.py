"""Samplers, noise schedules, preconditioning and guidance on the whole canvas."""
