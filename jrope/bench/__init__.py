"""Speed, beside the device's own limits and beside PyTorch."""
