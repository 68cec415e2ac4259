"""CIFAR-10: which groups of training images help a residual network with which held-out ones."""
