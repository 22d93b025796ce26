"""Patched networks written for places where retrofit is not."""
