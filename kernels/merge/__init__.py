"""Combine partial attention results by their log-sum-exp."""
