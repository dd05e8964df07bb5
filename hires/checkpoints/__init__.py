"""What a checkpoint is: families, headers, configs, parts. Loads no torch."""
