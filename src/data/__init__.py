"""Image sets, paired images and training samples."""
