"""The run's report, one HTML page that opens offline, and the model card."""
