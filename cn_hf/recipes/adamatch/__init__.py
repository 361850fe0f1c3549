"""AdaMatch (Berthelot et al. 2021): from a labelled domain to an unlabelled one, contexts = domains."""
