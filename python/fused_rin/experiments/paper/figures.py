"""What arXiv 1801.06105 reports, to stand beside what is measured."""

from __future__ import annotations

# Table 1: test accuracy in percent on MNIST pixel by pixel, (layers, units) -> model -> accuracy.
SEQUENTIAL = {
    (1, 100): {"rin": 91.64, "irnn": 83.55, "lstm": 24.10, "rin-dt": 95.41},
    (1, 200): {"rin": 94.60, "irnn": 92.86, "lstm": 47.13},
    (2, 100): {"rin": 93.69, "irnn": 92.15, "lstm": 39.50},
    (2, 200): {"rin": 94.82, "irnn": 94.78, "lstm": 22.27},
    (3, 100): {"rin": 94.15, "irnn": 94.03, "lstm": 54.98},
    (3, 200): {"rin": 95.19, "irnn": 95.05, "lstm": 61.20},
}
PERMUTED = {
    (1, 100): {"rin": 78.89, "irnn": 62.11, "lstm": 28.49, "rin-dt": 86.23},
    (1, 200): {"rin": 85.03, "irnn": 73.73, "lstm": 30.63},
    (2, 100): {"rin": 83.37, "irnn": 76.31, "lstm": 41.31},
    (2, 200): {"rin": 85.31, "irnn": 83.78, "lstm": 55.44},
    (3, 100): {"rin": 84.15, "irnn": 78.78, "lstm": 38.61},
    (3, 200): {"rin": 83.41, "irnn": 84.24, "lstm": 53.29},
}
# Table 3: test accuracy in percent on the 20 bAbI tasks, in order.
BABI = {
    "rin": (
        *(51.9, 18.7, 18.5, 71.2, 16.4, 50.3, 48.8, 33.6, 64.6, 45.1),
        *(71.6, 70.6, 94.4, 36.7, 54.8, 48.8, 53.9, 92.6, 10.5, 98.0),
    ),
    "irnn": (
        *(48.4, 18.7, 15.3, 72.6, 18.9, 50.3, 48.8, 33.6, 64.7, 43.7),
        *(67.8, 71.4, 94.2, 17.6, 54.1, 49.0, 53.4, 46.9, 10.9, 98.2),
    ),
    "lstm": (
        *(50.3, 19.0, 22.9, 71.6, 36.4, 52.3, 48.9, 33.6, 63.8, 45.1),
        *(78.4, 75.3, 94.4, 23.2, 26.7, 25.8, 52.0, 93.0, 9.9, 97.3),
    ),
}
# The adding problem is shown as curves only. What they say of the test error, by length and model.
ADDING = {
    200: {"rin": "solved", "irnn": "solved", "lstm": "solved"},
    300: {"rin": "solved", "irnn": "solved", "lstm": "solved"},
    400: {"rin": "solved", "irnn": "solved", "lstm": "not solved"},
}
ADDING_RATES = {200: 1e-4, 300: 1e-5, 400: 1e-6}
