"""Files of weights: read, recognised, loaded."""
