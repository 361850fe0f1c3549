"""The paper's experiments, each by one command: what a YAML file says, its cells, running them, and the report."""
