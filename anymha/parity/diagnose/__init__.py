"""Why two implementations differ: the catalogue of mistakes and the search through it."""
