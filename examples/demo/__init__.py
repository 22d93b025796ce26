"""Patch a real checkpoint, compare it with the dense one, save it, verify it, undo it."""
