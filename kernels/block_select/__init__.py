"""Select the key blocks worth visiting from pooled scores."""
