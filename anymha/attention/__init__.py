"""The mathematics of attention: one formula, its masks, its dropout, its optional features."""
