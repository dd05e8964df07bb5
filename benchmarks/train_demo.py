"""`python -m benchmarks.train_demo`: trains the model that ships; see `benchmarks/demo/train.py`."""

from __future__ import annotations

from benchmarks.demo.train import main

if __name__ == "__main__":
    main()
