"""The file formats of weights, read by their headers: safetensors, torch.save old and new, GGUF. Loads no torch."""
