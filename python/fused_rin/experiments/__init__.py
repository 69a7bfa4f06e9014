"""Experiments with recurrent networks: tasks, models, training, plots and the command line `fused-rin`.

Needs the `experiments` extra (`pip install 'fused-rin[experiments]'`); the rest of the package does not
import it.
"""
