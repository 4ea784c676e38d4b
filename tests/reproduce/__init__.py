"""The reproduction of the paper's tables, on small data made on the spot."""
