"""AMSDN: train, attack, evaluate and certify image classifiers against adversarial patches and sparse attacks."""

__version__ = "0.1.0"
