"""What is measured, how, against whom; `benchmarks/README.md` has the method and the figures."""
