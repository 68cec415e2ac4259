torch_version: str
cuda: bool
nvcc_version: str
cuda_architectures: str
compiler: str

def cpu_instruction_set() -> str: ...
