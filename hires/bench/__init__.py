"""What `hires bench` measures on this machine."""
