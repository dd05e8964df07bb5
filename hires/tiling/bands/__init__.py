"""How the exact VAE works inside: layers on bands of rows, and where maps are kept."""
