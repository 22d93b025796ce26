"""How the tokens of a network lie: grids, orders, attention sites."""
