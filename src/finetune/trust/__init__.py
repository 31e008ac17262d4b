"""Trust in what the stages write: they are killed and given damaged files, and what they then write is compared."""
