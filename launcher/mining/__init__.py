"""Hard negatives for training data, from a trained model."""
