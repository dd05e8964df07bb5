"""Predicted FLOPs and peak bytes of every stage, as functions of shapes."""
