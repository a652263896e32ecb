"""Fine-tuning: alignment of the projector, then projector and language model together."""
