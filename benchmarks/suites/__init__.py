"""The suites of `python -m benchmarks NAME`."""
