"""The exact VAE in bands: layers over rows of maps, and where the maps are stored."""
