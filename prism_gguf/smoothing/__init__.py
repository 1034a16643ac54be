"""The same function in weights that quantize better: scales moved along a transformer's exact symmetries."""
