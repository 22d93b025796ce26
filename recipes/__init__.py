"""Recipes that come with the package: one YAML file for a family and a method."""
