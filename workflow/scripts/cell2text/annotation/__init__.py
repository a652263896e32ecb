"""A trained model describes the cells and the clusters of a user's file."""
