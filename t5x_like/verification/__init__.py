"""A proof sheet for one's own config: what has to be equal, checked on a small model of the same structure."""
