"""Checks of the machine, the packages, the network and the data, for ``folio doctor``."""
