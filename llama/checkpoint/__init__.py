"""Checkpoint folders: find, read, reshard, convert, verify."""
