"""The experiment of new domains: corrupted images, networks, rivals, cells and their report."""
