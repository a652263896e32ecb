"""The run's page: one HTML file that shows what ran and what came of it, and opens offline."""
