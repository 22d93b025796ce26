"""Attention in windows of a token grid."""
