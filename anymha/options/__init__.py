"""The layer's options: the config, initialisers, regularisers, constraints."""
