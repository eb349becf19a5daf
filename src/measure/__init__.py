"""What networks cost and how fast they are, measured and as published."""
