"""Two implementations held against each other stage by stage, and how far they may be apart."""
