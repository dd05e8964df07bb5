"""From a small image to a larger one: enlargers, structure guidance, colour fixes."""
