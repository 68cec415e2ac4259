"""The only interface to ``torch.ops.ksm_ext``: typed functions, fake kernels, derivatives.

Every function here runs on the CPU and on CUDA, and raises before it computes. On the CPU they
give the same bits for any number of threads; but PyTorch's products inside of ``gram_update``,
``task_gram``, ``kernel_gram``, ``glm_gradient`` and ``glm_hvp`` may round by it where PyTorch
multiplies by another library than MKL. Derivatives go
through ``torch.autograd.Function`` that compiled graphs call whole (``_library.in_graph``): an
operator with ``register_autograd`` alone has silently zero tangents under ``torch.func.jvp``, and
so has a plain ``autograd.Function`` under ``torch.compile``.
"""

from ksm_ext.ops._library import BUILT_WITH_CUDA as BUILT_WITH_CUDA
from ksm_ext.ops.glm_hvp import GlmGradient as GlmGradient
from ksm_ext.ops.glm_hvp import glm_gradient as glm_gradient
from ksm_ext.ops.glm_hvp import glm_hvp as glm_hvp
from ksm_ext.ops.gram import gram_update as gram_update
from ksm_ext.ops.gram import kernel_gram as kernel_gram
from ksm_ext.ops.gram import task_gram as task_gram
from ksm_ext.ops.mask_gram import mask_gram as mask_gram
from ksm_ext.ops.mask_gram import mask_gram_matmul as mask_gram_matmul
from ksm_ext.ops.mask_gram import pack_masks as pack_masks
from ksm_ext.ops.project import Projector as Projector
from ksm_ext.ops.project import project as project
from ksm_ext.ops.project import project_ as project_
from ksm_ext.ops.project import project_adjoint as project_adjoint
from ksm_ext.ops.softmax_hvp import softmax_hvp as softmax_hvp
from ksm_ext.ops.softmax_hvp import softmax_hvp_ as softmax_hvp_
from ksm_ext.ops.weighted_mask_gram import weighted_mask_gram as weighted_mask_gram
from ksm_ext.ops.weighted_mask_gram import weighted_mask_gram_matmul as weighted_mask_gram_matmul
