# Importing it registers the operators of torch.ops.ksm_ext; its names are the facts of this build.
torch_version: str
nvcc_version: str
cuda_architectures: str
compiler: str

def cpu_instruction_set() -> str: ...
