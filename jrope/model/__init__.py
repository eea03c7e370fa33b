"""LLaMA: its configuration, its layers, its cache, and what a text's tokens score."""
