"""Ray shells round plain objects."""
