"""Networks, text encoders and VAEs: loading, adapters, precision, offload."""
