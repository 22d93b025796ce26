"""Benchmarks of operators and whole models, dense against sparse in one run."""
