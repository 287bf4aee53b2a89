"""Readers of the file formats that weights come in."""
