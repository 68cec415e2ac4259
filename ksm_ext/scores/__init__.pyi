from . import estimation as estimation
from . import logistic as logistic
from . import retraining as retraining
