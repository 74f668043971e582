"""Placeholder docstring; the public names are gathered here."""
