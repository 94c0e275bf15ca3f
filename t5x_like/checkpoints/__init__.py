"""Saving, restoring and converting: Orbax steps of our own, and one file per foreign format."""
