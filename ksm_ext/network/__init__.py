"""What is asked of a network: per-sample gradients, products with its Hessian, its spectrum."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
