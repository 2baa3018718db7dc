"""How the formula is run: in one piece, tile after tile, or by a fused kernel."""
