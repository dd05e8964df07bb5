"""What headers tell of LoRAs and their kin: keys, kinds, families, stated factors."""
