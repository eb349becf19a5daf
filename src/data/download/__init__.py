"""Published image sets: which archives hold them, and how these are fetched and unpacked."""
