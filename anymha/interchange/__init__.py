"""Weights from one layer to another."""
