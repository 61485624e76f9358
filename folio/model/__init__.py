"""The architecture; needs torch alone."""
