"""What headers tell of LoRAs, embeddings and their kin: keys, kinds, families, stated factors. Imports no torch."""
