"""A network run on pieces of an image, or on its flips and rotations."""
