"""Phyla: train, compress and compare language-model architectures with one loop.

The floors, top to bottom; imports only go down:

    phyla  configs  training  compression  models  kernels
"""

__version__ = "0.1.0"
