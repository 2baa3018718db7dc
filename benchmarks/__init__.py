"""How fast the layer is, and how much memory it takes, beside the framework's own layers."""
