"""Commands beside those that draw: what a machine, a checkpoint or a picture is."""
