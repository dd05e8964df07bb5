"""From a request to a file: plan, run, decode, write."""
