"""Proof that two implementations of the layer agree, and where they part if they do not."""
