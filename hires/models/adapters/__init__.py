"""What is added to a model: LoRAs, ControlNets, embeddings."""
