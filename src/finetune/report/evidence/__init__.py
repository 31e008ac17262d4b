"""What the runs left behind, checked and indexed."""
