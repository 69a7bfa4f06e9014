"""Training runs: settings, the loop, what lies in a run folder, and how it goes on."""
