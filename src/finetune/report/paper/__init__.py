"""What the paper prints, and what of it follows from what."""
