"""Architectures, recognised by structure: one file each."""
