"""Networks that are neither in transformers nor in diffusers."""
