"""The cells of the corpus, their split, and the reference text of each."""
