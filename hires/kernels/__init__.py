"""Attention and friends behind one dispatch that explains itself. Nothing here knows a model or the rest of hires."""
