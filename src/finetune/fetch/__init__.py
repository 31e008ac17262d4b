"""Models and data from the hub and from GitHub."""
