"""Few-step checkpoints: how they are told and how they are run. Imports no torch."""
