"""The cells to learn from and to be judged on, and the text that describes each."""
