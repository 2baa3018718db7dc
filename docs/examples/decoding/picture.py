"""The time of each letter over the length of the text, in one picture."""
