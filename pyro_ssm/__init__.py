"""Deep state-space models as ordinary Pyro programs."""
