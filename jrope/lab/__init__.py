"""The long-context laboratory: measure RoPE methods on one's own model and text."""
