"""Benchmarks of the service and its rivals; `benchmarks/README.md` has the method and the figures."""
