"""Models with fewer blocks: which ones matter, and the model without the others."""
