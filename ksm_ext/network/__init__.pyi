from . import batches as batches
from . import distributed as distributed
from . import features as features
from . import gradients as gradients
from . import hessian as hessian
from . import outputs as outputs
from . import solvers as solvers
from . import spectrum as spectrum
