"""The shipped demo model: its data, training and held-out scenes."""
