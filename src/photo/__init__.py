"""Photographs enlarged from file to file, with all that their files say."""
