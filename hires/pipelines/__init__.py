"""One file per model family, and the strategies that run them."""
