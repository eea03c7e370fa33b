"""Batch inference: files of prompts in, files of answers out, no row lost."""
