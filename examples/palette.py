"""The colours of all plots. An implementation has the same colour in each plot.

Each colour has a contrast of about 3 or more to white and to black, and the first five are
distinguishable with colour blindness (adapted from Okabe and Ito).
"""

BLUE, GREEN, ORANGE, PINK, YELLOW = "#2A86C7", "#009E73", "#D55E00", "#CC79A7", "#B8860B"
PURPLE, GREY = "#7B61C9", "#808080"

# The colour and the marker of each implementation that is compared.
STYLES = {
    "torch": (BLUE, "o"),
    "torch, keep": (PURPLE, "s"),
    "torch.compile": (GREEN, "D"),
    "torch.compile, keep": (GREEN, "D"),
    "pyfused": (ORANGE, "o"),
    "pyfused, linear": (PINK, "v"),
    "liger": (YELLOW, "v"),
    "Liger": (YELLOW, "v"),
    "cut-cross-entropy": (PINK, "s"),
    "copy": (GREY, "^"),
}

# The colours and markers of curves that are not implementations.
SERIES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (PINK, "^"), (YELLOW, "v"), (PURPLE, "P"))
