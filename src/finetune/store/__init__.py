"""Records and files."""
