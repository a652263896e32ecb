"""From counts to vectors: ranked genes of each cell, and one vector per gene and cell."""
