"""Adapters: LoRAs of every kind, merged into weights, and ControlNets."""
