"""Patched checkpoints on disk: save, prove, verify, load, undo."""
