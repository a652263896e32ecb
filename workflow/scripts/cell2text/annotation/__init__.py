"""A trained model put to work: everything it needs in one folder, and the cells of new files described with it."""
