"""The paper's experiments: its figures, its settings, and what came out when they were rerun."""
