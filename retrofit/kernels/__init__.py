"""The operators' public functions and the choice of their backend."""
