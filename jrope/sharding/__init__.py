"""Meshes of devices: which axis of an array is split over which axis of a mesh.

Under `jax.shard_map` every device runs the one-device program of a narrower model: its
share of the heads, of the MLP's width and of the vocabulary, for its share of the rows.
What the shares have to tell each other are the sums in `axes` and `vocabulary`.
"""
