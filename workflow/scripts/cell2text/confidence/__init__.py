"""How far to trust a description: calibrated probabilities, back-off in the ontology, and novelty of a cell."""
