"""Raw counts of every study in a common format, and the cells that pass QC."""
