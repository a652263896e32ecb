"""From counts to vectors: genes ranked in each cell, and one vector for each gene and cell."""
