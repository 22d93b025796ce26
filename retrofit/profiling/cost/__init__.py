"""Predict what a network costs, dense and patched, from its shapes and a few measured rates."""
