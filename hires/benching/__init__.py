"""The suites of `hires bench`: what this machine does with kernels, models, renders and files, in rows that compare."""
