# Importing it registers the CUDA kernels of torch.ops.ksm_ext; it has no names of its own.
