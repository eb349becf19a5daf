"""What a run shows: its page, pictures, attention maps and log for TensorBoard."""
