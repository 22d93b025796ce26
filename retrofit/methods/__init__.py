"""Attention methods: one file for each paper."""
