"""Set-up, benchmarks and experiments, run from the root of the checkout as `python -m scripts.<folder>.<name>`."""
