"""Adapters to other packages, each of which is imported only when it is used."""
