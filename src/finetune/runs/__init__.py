"""Runs and the cells that they stand in."""
