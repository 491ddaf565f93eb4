"""Hugging Face families: the only files that know their names."""
