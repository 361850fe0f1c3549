"""Siamese networks (Hadsell et al. 2006): verification by day and by night, restyled images."""
