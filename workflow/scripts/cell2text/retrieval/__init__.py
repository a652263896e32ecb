"""Search in words: cells and texts in one space, in which the cells nearest to a query answer it."""
