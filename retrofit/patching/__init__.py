"""Install recipes in models in memory, and take them out again."""
