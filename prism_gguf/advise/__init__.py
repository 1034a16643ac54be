"""What to change in a quantized file: measured before it is recommended."""
