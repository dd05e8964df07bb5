"""From a request to a plan, before anything is loaded. Loads no torch."""
