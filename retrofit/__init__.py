"""Replace the attention of a pretrained checkpoint, prove it, export it, undo it."""

__version__ = "0.1.0"
