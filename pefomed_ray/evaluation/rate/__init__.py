"""Human ratings: a local page on which people rate answers without knowing whose they are."""
